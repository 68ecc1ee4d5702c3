// --- answers

/** The body of a request. Questions that were not answered are asked together: templates want turns. */
function requestFor(conversation) {
  const messages = settings.system ? [{ role: "system", content: settings.system }] : [];
  for (const { role, text } of conversation.messages) {
    if (messages.at(-1)?.role === role) messages.at(-1).content += `\n\n${text}`;
    else messages.push({ role, content: text });
  }
  const options = Object.entries(settings).filter(([name, value]) => name !== "system" && value !== "");
  const chosen = Object.fromEntries(options.map(([name, value]) => [name, Number(value)]));
  return { model: model ?? undefined, messages, stream: true, stream_options: { include_usage: true }, ...chosen };
}

async function answer(conversation) {
  if (busy) return;
  const message = { role: "assistant", text: "" };
  const question = conversation.messages.at(-1);
  const request = requestFor(conversation);
  delete question.error;
  conversation.messages.push(message);
  const work = (busy = { conversation, message, controller: new AbortController(), saved: 0 });
  store(conversation);
  drawConversations();
  drawMessages();
  scrollTo(0, document.body.scrollHeight);
  speech.begin();
  try {
    await receive(work, request);
  } catch (error) {
    if (work.controller.signal.aborted) message.ended = "stopped";
    else message.error = error instanceof Refused ? `${error.message}.` : "The connection to the server was lost.";
  }
  if (!message.text && message.error) question.error = message.error;
  if (!message.text) conversation.messages = conversation.messages.filter((one) => one !== message);
  speech.end(message.error ?? (message.ended === "stopped" ? "Stopped." : ""));
  busy = null;
  if (conversation.messages.length && localStorage.getItem(PREFIX + conversation.id)) store(conversation);
  drawConversations();
  drawMessages();
}

async function receive(work, request) {
  const { message, controller } = work;
  const begun = performance.now();
  let first = null;
  let last = null;
  const tell = () => {
    if (first === null) return;
    message.first = (first - begun) / 1e3;
    message.seconds = (performance.now() - begun) / 1e3;
    if (message.tokens > 1 && last > first) message.speed = (message.tokens - 1) / ((last - first) / 1e3);
  };
  const headers = { "Content-Type": "application/json" };
  try {
    const reply = await ask("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(request), signal: controller.signal });
    for await (const { data } of events(reply)) {
      if (data === "[DONE]") return;
      const part = JSON.parse(data);
      if (part.error) throw new Refused(part.error.message);
      const text = part.choices[0]?.delta.content;
      if (text) {
        last = performance.now();
        first ??= last;
        message.tokens = (message.tokens ?? 0) + 1;
        message.text += text;
        draw(work);
      }
      if (part.choices[0]?.finish_reason === "length") message.ended = "ended at the limit of tokens";
      if (part.usage) Object.assign(message, { tokens: part.usage.completion_tokens, counted: true });
    }
    throw new Error("the stream has ended early");
  } finally {
    tell();
  }
}

/** Shows the answer at the next frame, and keeps it once a second. */
function draw(work) {
  speech.add(work.message.text);
  if (performance.now() - work.saved > 1000) {
    work.saved = performance.now();
    store(work.conversation);
  }
  work.frame ??= requestAnimationFrame(() => {
    work.frame = null;
    if (busy !== work || current !== work.conversation) return;
    const page = document.documentElement;
    const follows = page.scrollHeight - page.scrollTop - page.clientHeight < 120;
    showMarkdown(work.body, work.message.text);
    if (follows) scrollTo(0, page.scrollHeight);
  });
}

/** Reads an answer out to screen readers in whole sentences, at most one message in three seconds. */
const speech = {
  begin() {
    Object.assign(this, { text: "", said: 0, at: performance.now() });
    $("spoken").replaceChildren("The answer begins.");
  },
  add(text) {
    this.text = text;
    if (performance.now() - this.at < 3000) return;
    const end = Math.max(...[". ", "! ", "? ", "\n"].map((sign) => text.lastIndexOf(sign)));
    if (end >= this.said) this.speak(end + 1);
  },
  speak(end) {
    const part = this.text.slice(this.said, end).trim();
    if (part) $("spoken").append(el("p", {}, part));
    Object.assign(this, { said: end, at: performance.now() });
  },
  end(how) {
    this.speak(this.text.length);
    $("spoken").append(el("p", {}, how || "The answer has ended."));
  },
};
