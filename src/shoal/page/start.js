// --- views, theme, settings, and the start

const THEMES = ["auto", "light", "dark"];

function showTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  say($("theme"), `Theme: ${theme}`);
}

function nextTheme() {
  const theme = THEMES[(THEMES.indexOf(read("shoal.theme", "auto")) + 1) % THEMES.length];
  keep("shoal.theme", theme);
  showTheme(theme);
}

function showView(moved) {
  const view = location.hash === "#house" ? "house" : "chat";
  for (const name of ["chat", "house"]) $(name).hidden = name !== view;
  for (const link of document.querySelectorAll("nav.views a")) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${view === "house" ? "House" : "Chat"} – shoal`;
  if (view === "house") drawHouse();
  scrollTo(0, view === "house" ? 0 : document.body.scrollHeight);
  if (moved) $(`${view}-name`).focus({ preventScroll: true });
}

function openSettings() {
  for (const field of $("settings-dialog").querySelectorAll("[name]")) field.value = settings[field.name];
  $("forget-key").hidden = !sessionStorage.getItem("shoal.key");
  $("settings-dialog").showModal();
}

function saveSettings(event) {
  event.preventDefault();
  settings = { ...DEFAULTS, ...Object.fromEntries(new FormData(event.target)) };
  keep("shoal.settings", settings);
  $("settings-dialog").close();
}

function onKey(event) {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if ($("chat").classList.contains("shelf")) {
    showShelf(false);
    $("shelf-toggle").focus();
  } else if (busy && !event.target.closest?.(".editor")) busy.controller.abort();
}

function listen() {
  $("composer").addEventListener("submit", send);
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  });
  $("stop").addEventListener("click", () => (busy?.controller.abort(), $("question").focus()));
  $("new").addEventListener("click", () => (open(begun()), $("question").focus()));
  $("title").addEventListener("change", rename);
  $("title").addEventListener("keydown", (event) => event.key === "Enter" && $("question").focus());
  $("export").addEventListener("click", exportText);
  $("delete").addEventListener("click", remove);
  $("shelf-toggle").addEventListener("click", () => showShelf(true));
  $("theme").addEventListener("click", nextTheme);
  $("open-settings").addEventListener("click", openSettings);
  $("settings-dialog").querySelector("form").addEventListener("submit", saveSettings);
  $("key-dialog").querySelector("form").addEventListener("submit", useKey);
  $("forget-key").addEventListener("click", () => (sessionStorage.removeItem("shoal.key"), location.reload()));
  for (const button of document.querySelectorAll("[data-close]")) button.addEventListener("click", () => button.closest("dialog").close());
  addEventListener("hashchange", () => showView(true));
  addEventListener("keydown", onKey);
  addEventListener("storage", changedElsewhere);
  addEventListener("pagehide", () => busy && store(busy.conversation));
  new ResizeObserver(() => !$("house").hidden && drawHouse()).observe($("chain"));
}

async function start() {
  showTheme(read("shoal.theme", "auto"));
  listen();
  const known = conversations();
  open(known.find((one) => one.id === sessionStorage.getItem("shoal.current")) ?? known[0] ?? begun());
  showView(false);
  try {
    model = (await (await ask("/v1/models")).json()).data[0].id;
    if (!current.messages.length) drawMessages();
  } catch (error) {
    notice(error instanceof Refused ? `The server says: ${error.message}.` : "The server cannot be reached.");
    if (error.status === 401) return offline(NO_KEY);
  }
  follow();
}

start();
