// --- the house: what /house/events tells

const NO_KEY = "A key is needed to see the house: reload the page to give one.";
const house = { status: null, series: [], shown: "" };
/** The server says something every 5 s, and waits 10 s for the head. One that has lost its network never ends a connection. */
const SILENCE = 20000;

async function follow() {
  for (let wait = 1; ; wait = Math.min(wait * 2, 10)) {
    await visible();
    const controller = new AbortController();
    const leave = () => document.hidden && controller.abort();
    let silence;
    const heard = () => {
      clearTimeout(silence);
      silence = setTimeout(() => controller.abort(), SILENCE);
    };
    document.addEventListener("visibilitychange", leave);
    heard();
    try {
      const reply = await ask("/house/events", { signal: controller.signal });
      for await (const { name, data } of events(reply)) {
        wait = 1;
        heard();
        if (name === "status") hear(JSON.parse(data));
        else if (name === "error") offline(`There is no word from the head: ${JSON.parse(data).error.message}.`);
      }
    } catch (error) {
      if (error.status === 404) return inOneProcess();
      if (error.status === 401) return offline(NO_KEY);
    } finally {
      clearTimeout(silence);
      controller.abort();
      document.removeEventListener("visibilitychange", leave);
    }
    if (!document.hidden) offline("There is no word from the server. Trying again…");
    await new Promise((resolve) => setTimeout(resolve, wait * 1000));
  }
}

function visible() {
  if (!document.hidden) return null;
  return new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
}

function inOneProcess() {
  say($("house-state"), "The model runs in one process of this device, so there is no house to show. "
    + "`shoal up` spreads it over your devices; `shoal serve --nodes` serves it from nodes that run.");
  $("house-live").hidden = true;
  say($("pulse"), model ?? "");
}

function offline(text) {
  say($("house-state"), text);
  if (house.status) happened("bad", "The connection to the server was lost");
  house.status = null;
  say($("pulse"), "no connection");
}

function hear(status) {
  for (const [kind, text] of house.status ? changes(house.status, status) : greeting(status)) happened(kind, text);
  house.status = status;
  house.series = [...house.series, [Date.now(), status.tokens_per_s]].filter(([at]) => Date.now() - at < 120000);
  const working = status.devices.filter((device) => device.state === "working").length;
  say($("pulse"), `${status.model} · ${count(working, "device")} · ${status.running ? `${number(status.tokens_per_s, 1)} tokens/s` : status.phase}`);
  if (!$("house").hidden) drawHouse();
}

function greeting({ devices, moves }) {
  const names = devices.map((device) => device.name).join(", ") || "no device yet";
  return [...moves.map((move) => ["info", `Before: ${move.text}`]), ["info", `Connected: ${names}`]];
}

/** What the head does; layers move while it serves. Why it waits is told above. */
const phaseOf = ({ phase }) => (["moving", "committing"].includes(phase) ? "serving" : phase);

/** What happened between two looks, in sentences. */
function changes(before, now) {
  const found = [];
  const old = new Map(before.devices.map((device) => [device.name, device]));
  for (const device of now.devices) {
    found.push(...changesOf(old.get(device.name), device));
    old.delete(device.name);
  }
  for (const name of old.keys()) found.push(["bad", `${name} has left the list`]);
  const latest = before.moves.at(-1)?.seconds; // the text may change when the speed after it is known
  const fresh = now.moves.slice(now.moves.findLastIndex((move) => move.seconds === latest) + 1);
  found.push(...fresh.map((move) => [move.aborted ? "bad" : "good", move.text]));
  if (now.recoveries > before.recoveries) found.push(["good", "Answers went on after the loss of a device"]);
  if (phaseOf(now) !== phaseOf(before)) found.push(["info", `The head is ${phaseOf(now)}`]);
  const fetching = new Set(before.transfers.map((transfer) => transfer.device));
  for (const { device, wanted } of now.transfers) {
    if (!fetching.delete(device)) found.push(["info", `${device} fetches weights: ${megabytes(wanted)} MB`]);
  }
  for (const name of fetching) found.push(["good", `${name} fetches no more weights`]);
  return found;
}

function changesOf(before, device) {
  const { name, state, reason } = device;
  const why = reason && `: ${reason}`;
  if (!before) return [state === "joining" ? ["info", `${name} is joining`] : ["good", `${name} has joined`]];
  const found = [];
  if (state !== before.state) {
    if (state === "lost") found.push(["bad", `${name} is lost${why}`]);
    else if (state === "refused") found.push(["bad", `${name} is not used any more${why}`]);
    else if (state === "leaving") found.push(["info", `${name} is leaving, and its layers move away${why}`]);
    else if (before.state === "joining") found.push(["good", `${name} has joined`]);
    else if (before.state === "lost") found.push(["good", `${name} is back`]);
  }
  if (device.layers !== before.layers) {
    found.push(["info", device.layers ? `${name} computes ${device.layers}` : `${name} has no layers now`]);
  }
  return found;
}

function happened(kind, text) {
  const time = new Date().toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
  $("events").prepend(el("li", {}, el("time", {}, time), el("span", { class: kind }, text)));
  while ($("events").children.length > 100) $("events").lastElementChild.remove();
}

function drawHouse() {
  const { status } = house;
  if (!status) return;
  $("house-live").hidden = false;
  say($("house-name"), status.model);
  const went = status.recoveries ? ` Answers went on ${status.recoveries === 1 ? "once" : `${number(status.recoveries)} times`} after a loss.` : "";
  say($("house-state"), `The head is ${status.phase}${status.reason ? `: ${status.reason}` : "."}${went}`);
  drawFigures(status);
  drawChain(status);
  drawDevices(status);
  drawTransfers(status);
  drawSpeed(status);
}

// Predictions are for one answer; what is measured is that of all answers together. Each says which it is.
const FIGURES = [
  ["Measured now", (s) => number(s.tokens_per_s, 1), "tokens/s", (s) => `${count(s.running, "answer")}${s.running > 1 ? " together" : ""}${s.queued ? `, ${number(s.queued)} waiting` : ""}`],
  ["Predicted", (s) => (s.plan ? number(s.plan.tokens_per_s, 1) : "–"), "tokens/s", () => "for one answer"],
  ["Alone", (s) => (s.plan?.alone_tokens_per_s ? number(s.plan.alone_tokens_per_s, 1) : "–"), "tokens/s", (s) => (s.plan?.alone ? `${s.plan.alone}, predicted` : "no device can hold it alone")],
  ["So far", (s) => number(s.tokens), "tokens", (s) => `plan number ${number(s.epoch)}`],
  ["Context", (s) => (s.context ? number(s.context) : "–"), "tokens", () => "prompt and answer together"],
];

function drawFigures(status) {
  const list = $("figures");
  if (!list.children.length) {
    list.append(...FIGURES.map(([name, , unit]) => el("div", {}, el("dt", {}, name), el("dd", {}, el("b"), el("span", {}, ` ${unit}`), el("small")))));
  }
  FIGURES.forEach(([, value, , note], i) => {
    say(list.children[i].querySelector("b"), value(status));
    say(list.children[i].querySelector("small"), note(status));
  });
}

const inChain = (status) => status.devices.filter((device) => device.units);
const linkOf = (status, source, target) => status.links.find((link) => link.source === source && link.target === target);

function linkText(link) {
  if (!link) return ["", ""];
  return [milliseconds(link.latency_s), link.bytes_per_s === null ? "" : `${megabytes(link.bytes_per_s)} MB/s`];
}

const cut = (text, room) => (text.length <= room ? text : `${text.slice(0, room - 1)}…`);

/** The drawing: built when devices or the width change, else only its texts and its fish. */
function drawChain(status) {
  const stages = inChain(status);
  const others = status.devices.filter((device) => !device.units);
  const width = $("chain").clientWidth;
  if (!width) return; // it is not shown
  const shape = JSON.stringify([width, stages.map((one) => [one.name, one.state]), others.map((one) => [one.name, one.state])]);
  if (shape !== house.shown) {
    house.shown = shape;
    house.drawing = buildChain(stages, others, width);
    $("chain").replaceChildren(house.drawing.root);
  }
  const { boxes, links, water, head } = house.drawing;
  say(head, status.running ? `${number(status.tokens_per_s, 1)} tokens/s` : "no answer runs");
  stages.forEach((device, i) => {
    const { layers, times } = boxes[i];
    say(layers, cut(device.layers, 24));
    const measured = device.measured_s === null ? "" : milliseconds(device.measured_s);
    say(times, device.state === "lost" ? "lost" : measured || (device.predicted_s === null ? "" : `${milliseconds(device.predicted_s)} predicted`));
  });
  const names = ["coordinator", ...stages.map((one) => one.name), "coordinator"];
  links.forEach(([above, below], i) => {
    const [latency, rate] = linkText(linkOf(status, names[i], names[i + 1]));
    say(above, latency);
    say(below, rate);
  });
  stock(water, Math.min(status.running, 12));
  const swim = status.running && !still.matches ? " Each fish is an answer under way." : "";
  say($("chain-note"), `${wayText(status, stages)}${swim}`);
}

function wayText(status, stages) {
  if (!stages.length) return "No device has layers yet.";
  const parts = stages.map((device) => `${device.name} (${device.layers})`);
  return `A token goes from the head through ${parts.join(", then ")}, and back.`;
}

const BOX = { width: 188, height: 78, gap: 72 };

function buildChain(stages, others, width) {
  const n = stages.length + 1;
  const wide = n * BOX.width + (n - 1) * BOX.gap <= width;
  const gap = wide ? Math.min(160, (width - n * BOX.width) / Math.max(1, n - 1)) : 44;
  const left = wide ? (width - n * BOX.width - (n - 1) * gap) / 2 : 0;
  const size = { width: wide ? BOX.width : Math.min(width - 112, 340), height: BOX.height };
  const place = (i) => (wide ? { x: left + i * (size.width + gap), y: 14 } : { x: 4, y: 8 + i * (size.height + gap) });
  const end = wide ? 14 + size.height : 8 + n * size.height + (n - 1) * gap;
  const bank = end + (wide && stages.length ? 66 : 26);
  const columns = Math.max(1, Math.floor(width / 170));
  const height = others.length ? bank + Math.ceil(others.length / columns) * 46 : bank;
  const way = wayPath(place, size, n, wide);
  const water = svg("g");
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" }, svg("path", { class: "way", d: way }), water);
  const [head, ...boxes] = [{ name: "head", state: "working" }, ...stages].map((device, i) => box(root, device, place(i), size));
  others.forEach((device, i) => pill(root, device, { x: 4 + (i % columns) * 170, y: bank + Math.floor(i / columns) * 46 }));
  const links = stages.length ? [...stages.map((_, i) => (wide ? between(root, place(i), size, gap) : below(root, place(i), size, gap))), home(root, place, size, n, wide)] : [];
  return { root, head: head.layers, boxes, links, water: Object.assign(water, { way }) };
}

/** The way of a token: through all boxes and back to the first. */
function wayPath(place, size, n, wide) {
  if (n === 1) return "";
  const [first, last] = [place(0), place(n - 1)];
  const middle = { x: size.width / 2, y: size.height / 2 };
  if (wide) {
    const [from, to, low] = [first.x + middle.x, last.x + middle.x, first.y + size.height + 34];
    return `M${from} ${first.y + middle.y}H${to}V${low - 16}q0 16-16 16H${from + 16}q-16 0-16-16Z`;
  }
  const [x, side] = [first.x + middle.x, first.x + size.width + 30];
  return `M${x} ${first.y + middle.y}V${last.y + middle.y}H${side - 16}q16 0 16-16V${first.y + middle.y + 16}q0-16-16-16Z`;
}

function box(root, device, at, size) {
  const text = (name, y) => svg("text", { class: name, x: at.x + 14, y: at.y + y });
  const [layers, times] = [text("small layers", 46), text("small", 65)];
  const group = svg("g", { class: device.state }, svg("rect", { class: "box", x: at.x, y: at.y, rx: 14, ...size }), text("name", 26), layers, times);
  say(group.querySelector(".name"), cut(device.name, 17));
  root.append(group);
  return { layers, times };
}

function pill(root, device, at) {
  const group = svg("g", { class: device.state }, svg("rect", { class: "box", x: at.x, y: at.y, rx: 17, width: 158, height: 34 }), svg("text", { class: "small", x: at.x + 14, y: at.y + 22 }));
  say(group.querySelector("text"), cut(`${device.name}: ${device.state}`, 22));
  root.append(group);
}

function label(root, x, y, anchor) {
  const text = svg("text", { class: "small", x, y, "text-anchor": anchor });
  root.append(text);
  return text;
}

function between(root, at, size, gap) {
  const [x, y] = [at.x + size.width + gap / 2, at.y + size.height / 2];
  return [label(root, x, y - 9, "middle"), label(root, x, y + 21, "middle")];
}

function below(root, at, size, gap) {
  const [x, y] = [at.x + size.width / 2, at.y + size.height + gap / 2 + 5];
  return [label(root, x - 12, y, "end"), label(root, x + 12, y, "start")];
}

function home(root, place, size, n, wide) {
  const [first, last] = [place(0), place(n - 1)];
  if (wide) {
    const [x, y] = [(first.x + last.x + size.width) / 2, first.y + size.height + 34];
    return [label(root, x, y - 8, "middle"), label(root, x, y + 20, "middle")];
  }
  const [x, y] = [first.x + size.width + 36, (first.y + last.y + size.height) / 2];
  return [label(root, x, y - 4, "start"), label(root, x, y + 14, "start")];
}

/** As many fish on the way as answers run. */
function stock(water, wanted) {
  const fish = still.matches || !water.way ? 0 : wanted;
  while (water.children.length > fish) water.lastElementChild.remove();
  while (water.children.length < fish) {
    const motion = { path: water.way, dur: "9s", begin: `-${water.children.length * 0.75}s`, repeatCount: "indefinite", rotate: "auto" };
    water.append(svg("path", { class: "fish", d: "M12 0C6-7-4-7-9 0l-7-5v10l7-5c5 7 15 7 21 0z" }, svg("animateMotion", motion)));
  }
}

const ramText = (d) => (d.ram_promise === null ? null : d.ram === null ? `${megabytes(d.ram_promise)} MB promised` : `${megabytes(d.ram)} of ${megabytes(d.ram_promise)} MB promised`);

function stepText(d) {
  if (d.predicted_s === null && d.measured_s === null) return null;
  const measured = d.measured_s === null ? "not measured" : milliseconds(d.measured_s);
  return d.predicted_s === null ? measured : `${measured}, predicted ${milliseconds(d.predicted_s)}`;
}

/** Rows of a device: name, text (null: no row), and a bar as shares of its width: what is, and a mark. */
const FACTS = [
  ["Layers", (d) => d.layers || null],
  ["RAM", ramText, (d) => (d.ram === null || !d.ram_promise ? null : [d.ram / d.ram_promise, null])],
  ["A step takes", stepText, (d, s) => (d.measured_s === null ? null : [d.measured_s / slowest(s), d.predicted_s === null ? null : d.predicted_s / slowest(s)])],
  ["Waits for others", (d) => (d.waiting === null || !d.units ? null : `${percent(d.waiting)} of the time`)],
  ["Link to it", (d, s) => linkFact(linkTo(d, s))],
  ["Battery", (d) => (d.battery === null ? null : `${Math.round(d.battery)}%`), (d) => (d.battery === null ? null : [d.battery / 100, null])],
  ["Temperature", (d) => (d.temperature === null ? null : `${Math.round(d.temperature)} °C`)],
  ["Its owner lets it work", (d) => (d.share < 1 ? `${percent(d.share)} of the time` : null)],
  ["Copies in RAM", (d) => (d.copies ? count(d.copies, "other unit") : null)],
  ["Files on disk", (d, s) => (d.held === null ? null : `${d.held} of ${s.units} units`)],
];

const slowest = (status) => Math.max(...status.devices.flatMap((d) => [d.measured_s ?? 0, d.predicted_s ?? 0]), 1e-9);

function linkTo(device, status) {
  const stages = inChain(status);
  const i = stages.indexOf(device);
  return linkOf(status, i > 0 ? stages[i - 1].name : "coordinator", device.name);
}

function linkFact(link) {
  if (!link) return null;
  const rate = link.bytes_per_s === null ? "" : `, ${megabytes(link.bytes_per_s)} MB/s`;
  return `${milliseconds(link.latency_s)} (95%: ${milliseconds(link.latency_p95_s)})${rate}`;
}

function drawDevices(status) {
  const known = new Map([...$("devices").children].map((card) => [card.device, card]));
  status.devices.forEach((device, i) => {
    const card = known.get(device.name) ?? cardFor(device);
    known.delete(device.name);
    if ($("devices").children[i] !== card) $("devices").insertBefore(card, $("devices").children[i] ?? null);
    drawCard(card, device, status);
  });
  for (const card of known.values()) card.remove();
}

function cardFor(device) {
  const rows = FACTS.map(([name]) => el("div", {}, el("dt", {}, name), el("dd"), el("span", { class: "meter", "aria-hidden": "true" }, el("i"), el("b"))));
  const card = el("li", { class: "card" }, el("h3", {}, device.name, el("span", { class: "badge" })), el("p", { class: "reason" }), el("dl", {}, ...rows));
  return Object.assign(card, { device: device.name, rows });
}

function drawCard(card, device, status) {
  card.className = `card ${device.state}`;
  say(card.querySelector(".badge"), device.state);
  say(card.querySelector(".reason"), device.reason);
  FACTS.forEach(([name, text, bar], i) => {
    const [, value, meter] = card.rows[i].children;
    const shown = text(device, status);
    const shares = bar?.(device, status) ?? null;
    card.rows[i].hidden = shown === null;
    say(value, shown ?? "");
    value.classList.toggle("hot", name === "Temperature" && device.temperature >= 40);
    meter.hidden = !shares;
    if (shares) meter.firstChild.style.width = percent(Math.min(1, shares[0]));
    meter.lastChild.hidden = !shares || shares[1] === null;
    if (shares && shares[1] !== null) meter.lastChild.style.left = percent(Math.min(0.99, shares[1]));
  });
}

function drawTransfers({ transfers }) {
  $("transfers-part").hidden = !transfers.length;
  const list = $("transfers");
  while (list.children.length > transfers.length) list.lastElementChild.remove();
  while (list.children.length < transfers.length) list.append(el("li", {}, el("span"), el("progress", { max: 1 }), el("small")));
  transfers.forEach(({ device, got, wanted, bytes_per_s: rate, problem }, i) => {
    const [name, bar, note] = list.children[i].children;
    say(name, device);
    bar.setAttribute("aria-label", `Weights for ${device}`);
    bar.value = wanted ? got / wanted : 0;
    const left = rate > 0 ? `, ${megabytes(rate)} MB/s, ${number((wanted - got) / rate)} s left` : "";
    say(note, `${megabytes(got)} of ${megabytes(wanted)} MB${left}${problem && `. ${problem}`}`);
  });
}

function drawSpeed({ plan }) {
  const planned = plan?.tokens_per_s ?? 0;
  const most = Math.max(planned, ...house.series.map(([, speed]) => speed), 1) * 1.1;
  const now = Date.now();
  const y = (speed) => 100 - (speed / most) * 100;
  const points = house.series.map(([at, speed]) => `${(300 - (now - at) / 400).toFixed(1)} ${y(speed).toFixed(1)}`);
  $("speed").querySelector(".measured").setAttribute("d", points.length ? `M${points.join("L")}` : "");
  $("speed").querySelector(".planned").setAttribute("d", planned ? `M0 ${y(planned)}H300` : "");
  const best = Math.max(0, ...house.series.map(([, speed]) => speed));
  say($("speed-note"), `The last two minutes: at most ${number(best, 1)} tokens/s of all answers together. Dashed: predicted for one answer.`);
}
