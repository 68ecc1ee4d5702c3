// --- small tools

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const still = matchMedia("(prefers-reduced-motion: reduce)");

/** An element with attributes (`on…`: listeners) and children. Text becomes text nodes, never markup. */
function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** Changes a text only if it is another, so that nothing is read out again or loses its selection. */
function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function number(value, digits = 0) {
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

const milliseconds = (s) => `${number(s * 1e3, s < 0.1 ? 1 : 0)} ms`;
const megabytes = (bytes) => number(bytes / 1e6, bytes < 1e7 ? 1 : 0);
const percent = (share) => `${Math.round(share * 100)}%`;
const count = (n, one, many = `${one}s`) => `${number(n)} ${n === 1 ? one : many}`;

function read(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function keep(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch {
    notice("The browser has no room for this conversation: export it, or delete others.");
  }
}

let noticeTimer;
function notice(text, label, action) {
  clearTimeout(noticeTimer);
  const close = () => $("notice").replaceChildren();
  const button = label && el("button", { type: "button", onclick: () => (close(), action()) }, label);
  $("notice").replaceChildren(text, button ?? "");
  noticeTimer = setTimeout(close, 12000);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // without https, browsers have only the old way
    const area = el("textarea", { class: "unseen" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  notice("Copied.");
}
