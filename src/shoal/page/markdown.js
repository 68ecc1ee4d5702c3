// --- Markdown, as DOM nodes

const INLINE = /(`+)(.{1,2000}?)\1(?!`)|\*\*(.{1,2000}?)\*\*|\*([^\s*][^*]{0,500}?)\*|(?<!\w)_([^\s_][^_]{0,500}?)_(?!\w)|\[([^\][]{1,300})\]\((https?:\/\/[^\s()]{1,2000})\)|(https?:\/\/[^\s<>()"`]{1,2000}[^\s<>()"`.,;:!?])/gs;

function inline(text, depth = 0) {
  if (depth > 4) return [text];
  const found = [];
  let last = 0;
  for (const match of text.matchAll(INLINE)) {
    const [whole, , code, strong, star, under, label, address, bare] = match;
    found.push(text.slice(last, match.index));
    last = match.index + whole.length;
    if (code) found.push(el("code", {}, code.replace(/^ (.*) $/s, "$1")));
    else if (strong) found.push(el("strong", {}, ...inline(strong, depth + 1)));
    else if (star ?? under) found.push(el("em", {}, ...inline(star ?? under, depth + 1)));
    else found.push(el("a", { href: address ?? bare, target: "_blank", rel: "noopener noreferrer" }, label ?? bare));
  }
  return [...found, text.slice(last)];
}

const FENCE = /^\s{0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^(#{1,6})\s+(.*[^\s#])?[\s#]*$/;
const ITEM = /^(\s{0,3})([-*+]|\d{1,9}[.)])\s+/;
const RULE = /^\s{0,3}([-*_])(\s*\1){2,}\s*$/;
const QUOTE = /^\s{0,3}> ?/;
const CELLS = /^(?=[^-]*-[^|]*\|)[\s:|-]*$/;
const STARTS = [FENCE, HEADING, ITEM, RULE, QUOTE];

/** The blocks of a text: the lines of each, and a function that makes its element. */
function blocks(lines, depth = 0) {
  const found = [];
  let i = 0;
  const take = (goes) => {
    const from = i++;
    while (i < lines.length && goes(lines[i], i)) i++;
    return lines.slice(from, i);
  };
  const add = (source, make) => found.push({ source: source.join("\n"), make });
  while (i < lines.length) {
    const line = lines[i];
    const fence = FENCE.exec(line);
    const list = ITEM.exec(line);
    if (!line.trim()) i++;
    else if (fence) {
      const body = take((next) => !next.trim().startsWith(fence[1]));
      const closed = i < lines.length ? [lines[i++]] : [];
      add([...body, ...closed], () => codeBlock(body.slice(1).join("\n"), fence[2]));
    } else if (HEADING.test(line)) {
      const [, signs, text = ""] = HEADING.exec(take(() => false)[0]);
      add([line], () => el(`h${Math.min(6, signs.length + 2)}`, {}, ...inline(text)));
    } else if (RULE.test(line)) add(take(() => false), () => el("hr"));
    else if (QUOTE.test(line) && depth < 6) {
      const body = take((next) => QUOTE.test(next));
      add(body, () => el("blockquote", {}, ...nodes(body.map((one) => one.replace(QUOTE, "")), depth + 1)));
    } else if (list && depth < 6) {
      const body = take((next, at) => ITEM.test(next) || /^\s{2,}\S/.test(next)
        || (!next.trim() && /^\s{2,}\S/.test(lines[at + 1] ?? "")) || (!next.trim() && ITEM.test(lines[at + 1] ?? "")));
      add(body, () => listOf(body, list, depth));
    } else if (line.includes("|") && CELLS.test(lines[i + 1] ?? "")) {
      const body = take((next) => next.includes("|"));
      add(body, () => tableOf(body));
    } else {
      const body = take((next) => next.trim() && !STARTS.some((start) => start.test(next)));
      add(body, () => el("p", {}, ...inline(body.join("\n"))));
    }
  }
  return found;
}

const nodes = (lines, depth) => blocks(lines, depth).map((block) => block.make());

function codeBlock(text, language) {
  const button = el("button", { type: "button", class: "quiet", onclick: () => copy(text) }, "Copy");
  const label = language ? `Code in ${language}` : "Code";
  return el("div", { class: "code" }, el("pre", { tabindex: 0, role: "region", "aria-label": label }, el("code", {}, text)), button);
}

function listOf(lines, [, margin, mark], depth) {
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= margin.length + 1) items.push({ width: item[0].length, lines: [line.slice(item[0].length)] });
    else items.at(-1).lines.push(line.slice(Math.min(items.at(-1).width, line.search(/\S|$/))));
  }
  const numbered = /\d/.test(mark);
  return el(numbered ? "ol" : "ul", numbered ? { start: parseInt(mark, 10) } : {}, ...items.map((item) => {
    const made = nodes(item.lines, depth + 1);
    return el("li", {}, ...(made[0]?.tagName === "P" ? [...made[0].childNodes, ...made.slice(1)] : made));
  }));
}

function tableOf([head, , ...rows]) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => inline(cell.trim()));
  const row = (line, tag) => el("tr", {}, ...cells(line).map((cell) => el(tag, {}, ...cell)));
  const table = el("table", {}, el("thead", {}, row(head, "th")), el("tbody", {}, ...rows.map((line) => row(line, "td"))));
  return el("div", { class: "table", tabindex: 0, role: "region", "aria-label": "Table" }, table);
}

/** Shows a text in a node. Blocks that have not changed stay as they are. */
function showMarkdown(node, text) {
  const wanted = blocks(text.split("\n"));
  const shown = node.blocks ?? [];
  let same = 0;
  while (same < shown.length && shown[same] === wanted[same]?.source) same++;
  while (node.children.length > same) node.lastElementChild.remove();
  node.append(...wanted.slice(same).map((block) => block.make()));
  node.blocks = wanted.map((block) => block.source);
}
