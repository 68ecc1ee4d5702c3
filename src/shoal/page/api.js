// --- the server

class Refused extends Error {}

/** A request with the key, which is asked for when the server wants one. Refused: an error in its words. */
async function ask(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem("shoal.key");
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    const reply = await fetch(path, { cache: "no-store", ...options, headers });
    if (reply.ok) return reply;
    const said = await reply.json().then((body) => body.error.message, () => `the server answered ${reply.status}`);
    if (reply.status !== 401) throw Object.assign(new Refused(said), { status: reply.status });
    await askForKey(key, said);
  }
}

let asking = null;
function askForKey(tried, said) {
  if (sessionStorage.getItem("shoal.key") !== tried) return null; // there is another one by now
  sessionStorage.removeItem("shoal.key");
  const dialog = $("key-dialog");
  $("key-problem").hidden = !tried;
  say($("key-problem"), tried ? `${said}.` : "");
  asking ??= new Promise((resolve, reject) => {
    dialog.showModal();
    dialog.onclose = () => {
      asking = null;
      if (sessionStorage.getItem("shoal.key")) resolve();
      else reject(Object.assign(new Refused("no key was given"), { status: 401 }));
    };
  });
  return asking;
}

function useKey(event) {
  event.preventDefault();
  sessionStorage.setItem("shoal.key", $("key").value.trim());
  $("key").value = "";
  $("key-dialog").close();
}

/** The events of a text/event-stream: their name and data. */
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n").map((line) => line.split(/: ?(.*)/s));
      const data = lines.filter(([name]) => name === "data").map(([, line]) => line).join("\n");
      if (data) yield { name: lines.find(([name]) => name === "event")?.[1], data };
    }
  }
}
