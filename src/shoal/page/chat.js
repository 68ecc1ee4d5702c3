// --- conversations: each is kept under a key of its own, so that two tabs do not overwrite each other

const PREFIX = "shoal.chat.";
const DEFAULTS = { system: "", temperature: "0.7", max_tokens: "", top_p: "", top_k: "", min_p: "", repetition_penalty: "", seed: "" };
let settings = { ...DEFAULTS, ...read("shoal.settings", {}) };
let model = null;
let current = null;
/** The answer under way: its conversation, its message, what ends it. */
let busy = null;

function conversations() {
  const found = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX)).map((key) => read(key, null));
  return found.filter((one) => one && Array.isArray(one.messages)).sort((a, b) => b.changed - a.changed);
}

function begun() {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, title: "", changed: Date.now(), messages: [] };
}

function store(conversation) {
  conversation.changed = Date.now();
  if (conversation.messages.length) keep(PREFIX + conversation.id, conversation);
}

const titleOf = (conversation) => conversation.title || conversation.messages[0]?.text.slice(0, 60) || "New conversation";

function open(conversation) {
  current = busy?.conversation.id === conversation.id ? busy.conversation : conversation;
  sessionStorage.setItem("shoal.current", current.id);
  showShelf(false);
  drawConversations();
  drawMessages();
  scrollTo(0, document.body.scrollHeight);
}

function drawConversations() {
  const all = conversations();
  if (!all.some((one) => one.id === current.id)) all.unshift(current);
  $("conversations").replaceChildren(...all.map((one) => el("li", {}, el("button", {
    type: "button",
    "aria-current": one.id === current.id && "true",
    onclick: () => (open(one), $("question").focus()),
  }, titleOf(one)))));
  $("title").value = titleOf(current);
  $("export").hidden = $("delete").hidden = !current.messages.length;
}

function rename() {
  current.title = $("title").value.trim();
  store(current);
  drawConversations();
}

function remove() {
  const gone = current;
  if (busy?.conversation === gone) busy.controller.abort();
  localStorage.removeItem(PREFIX + gone.id);
  open(conversations()[0] ?? begun());
  $("question").focus();
  notice("The conversation was deleted.", "Undo", () => (store(gone), open(gone)));
}

function exportText() {
  const parts = current.messages.map((one) => `## ${one.role === "user" ? "You" : "Answer"}\n\n${one.text}\n`);
  const address = URL.createObjectURL(new Blob([`# ${titleOf(current)}\n\n`, parts.join("\n")], { type: "text/markdown" }));
  const name = titleOf(current).slice(0, 60).match(/[\p{L}\p{N}]+/gu)?.join("-") ?? "conversation";
  el("a", { href: address, download: `${name}.md` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

/** Another tab has changed a conversation. */
function changedElsewhere(event) {
  if (!event.key?.startsWith(PREFIX)) return;
  if (event.key === PREFIX + current.id && event.newValue && busy?.conversation !== current) {
    current = JSON.parse(event.newValue);
    drawMessages();
  }
  drawConversations();
}

function showShelf(shown) {
  $("chat").classList.toggle("shelf", shown);
  $("shelf-toggle").setAttribute("aria-expanded", shown);
  $("talk").inert = shown;
  if (shown) $("new").focus();
}

// --- messages

function drawMessages() {
  const list = current.messages.map((message, i) => (message.role === "user" ? questionNode(message, i) : answerNode(message, i)));
  $("messages").replaceChildren(...(list.length ? list : [welcome()]));
  $("send").hidden = Boolean(busy);
  $("stop").hidden = !busy;
}

function welcome() {
  const fish = svg("svg", { width: 56, height: 56, viewBox: "0 0 32 32", "aria-hidden": "true" }, ...[...document.querySelectorAll(".brand path")].map((path) => path.cloneNode()));
  const told = "Questions stay in your house, and conversations in this browser.";
  return el("div", { class: "begin" }, fish, el("p", {}, model ? `${model} is listening.` : "shoal"), el("p", {}, told));
}

function action(label, does) {
  return el("button", { type: "button", class: "quiet", onclick: does }, label);
}

function questionNode(message, i) {
  const node = el("article", { class: "message user", "aria-label": "You" }, el("div", {}, message.text));
  const doing = el("div", { class: "doing" });
  if (!busy) doing.append(action("Edit", () => edit(node, i)));
  doing.append(action("Copy", () => copy(message.text)));
  const last = i === current.messages.length - 1;
  if (message.error) node.append(el("p", { class: "problem" }, message.error));
  if (last && !busy) doing.append(action("Ask again", () => answer(current)));
  node.append(doing);
  return node;
}

function answerNode(message, i) {
  const body = el("div", { class: "answer" });
  const node = el("article", { class: "message", "aria-label": "Answer" }, body);
  showMarkdown(body, message.text);
  if (busy?.message === message) {
    busy.body = body;
    body.classList.add("waiting");
    return node;
  }
  if (message.error) node.append(el("p", { class: "problem" }, message.error));
  const doing = el("div", { class: "doing" }, action("Copy", () => copy(message.text)));
  if (i === current.messages.length - 1 && !busy) doing.append(action("Regenerate", () => replaceFrom(i, [])));
  doing.append(el("span", { class: "facts number" }, factsOf(message)));
  node.append(doing);
  return node;
}

function factsOf({ tokens, counted, speed, first, seconds, ended }) {
  const facts = [];
  if (tokens) facts.push(counted ? count(tokens, "token") : `about ${count(tokens, "token")}`);
  if (speed) facts.push(`${number(speed, 1)} tokens/s`);
  if (first) facts.push(`first after ${number(first, 2)} s`);
  if (seconds) facts.push(`${number(seconds, 1)} s in all`);
  if (ended) facts.push(ended);
  return facts.join(" · ");
}

function edit(node, i) {
  const area = el("textarea", { "aria-label": "Edit your message" });
  area.value = current.messages[i].text;
  const save = (event) => {
    event.preventDefault();
    if (area.value.trim()) replaceFrom(i, [{ role: "user", text: area.value.trim() }]);
  };
  const cancel = () => (drawMessages(), focusIn(i, "button"));
  const row = el("div", { class: "row" }, el("button", { class: "main", type: "submit" }, "Ask"), el("button", { type: "button", onclick: cancel }, "Cancel"));
  const onkeydown = (event) => {
    if (event.key === "Escape") cancel();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save(event);
  };
  node.replaceChildren(el("form", { class: "editor", onsubmit: save, onkeydown }, area, row));
  area.focus();
}

const focusIn = (i, what) => $("messages").children[i]?.querySelector(what)?.focus();

/** Puts messages in the place of those from the i-th on, and asks. */
function replaceFrom(i, messages) {
  const conversation = current;
  const before = conversation.messages;
  conversation.messages = [...before.slice(0, i), ...messages];
  const undo = () => {
    if (busy?.conversation === conversation) busy.controller.abort();
    conversation.messages = before;
    store(conversation);
    open(conversation);
  };
  if (before.length > i + 1 || !messages.length) notice("What followed was replaced.", "Undo", undo);
  $("question").focus();
  answer(conversation);
}

function send(event) {
  event.preventDefault();
  const text = $("question").value.trim();
  if (!text || busy) return;
  $("question").value = "";
  current.messages.push({ role: "user", text });
  answer(current);
}
