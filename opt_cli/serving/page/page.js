"use strict";
// One prompt, one or two models: tokens as they come, how likely each was, and where two texts part.

const $ = (id) => document.getElementById(id);
const BOUNDS = [0.02, 0.1, 0.3, 0.7]; // between the colours of probabilities
let running = null; // an AbortController while texts are written
let outputs = [];

function say(text, isWrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", isWrong);
}

function make(name, className, text = "") {
  const element = document.createElement(name);
  element.className = className;
  element.textContent = text;
  return element;
}

function headers() {
  const found = { "Content-Type": "application/json" };
  if ($("key").value) found.Authorization = "Bearer " + $("key").value;
  return found;
}

async function refusal(response) {
  if (response.status === 401) $("key-box").hidden = false;
  const body = await response.json().catch(() => ({}));
  return new Error(body.error ? body.error.message : "HTTP " + response.status);
}

async function loadModels() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (!response.ok) throw await refusal(response);
  const models = (await response.json()).data;
  for (const model of models) {
    for (const id of ["model", "compare"]) $(id).append(new Option(model.id, model.id));
  }
  $("compare-box").hidden = models.length < 2;
  say("Ready");
}

class Output {
  constructor(model, prompt) {
    this.tokens = []; // of each token: its text, probability, alternatives and span
    this.waiting = []; // tokens whose text is not certain yet
    const section = make("section", "output");
    const title = make("h2", "", model);
    this.text = make("div", "text");
    this.note = make("p", "note");
    this.text.tabIndex = 0;
    this.text.setAttribute("role", "group");
    this.text.setAttribute("aria-label", "Text of " + model);
    this.text.append(make("span", "prompt", prompt));
    this.text.addEventListener("keydown", (event) => this.move(event));
    section.append(title, this.text, this.note);
    $("outputs").append(section);
    this.chosen = -1;
  }

  add(choice) {
    const shown = choice.logprobs;
    for (let i = 0; shown && i < shown.tokens.length; i += 1) {
      this.waiting.push({
        text: shown.tokens[i],
        probability: Math.exp(shown.token_logprobs[i]),
        others: Object.entries(shown.top_logprobs[i]),
      });
    }
    if (!choice.text) return;
    if (!this.waiting.length) {
      this.text.append(choice.text);
      return;
    }
    // Tokens that make one character together are one piece.
    const least = Math.min(...this.waiting.map((token) => token.probability));
    const span = make("span", "token p" + BOUNDS.filter((bound) => least >= bound).length, choice.text);
    for (const token of this.waiting) {
      const place = this.tokens.push({ ...token, span }) - 1;
      span.addEventListener("pointerenter", () => this.choose(place));
    }
    this.waiting = [];
    this.text.append(span);
  }

  choose(place) {
    for (const span of document.querySelectorAll(".token.chosen")) span.classList.remove("chosen");
    this.chosen = place;
    const token = this.tokens[place];
    token.span.classList.add("chosen");
    $("details-title").textContent = `Token ${place + 1}: ${JSON.stringify(token.text)}`;
    const body = document.querySelector("#details tbody");
    body.replaceChildren();
    for (const [text, logprob] of token.others.sort((a, b) => b[1] - a[1])) {
      const row = make("tr", text === token.text ? "taken" : "");
      const name = JSON.stringify(text) + (text === token.text ? " (taken)" : "");
      row.append(make("td", "", name), make("td", "", (100 * Math.exp(logprob)).toFixed(1) + " %"));
      body.append(row);
    }
    document.querySelector("#details table").hidden = false;
    $("details-hint").hidden = true;
  }

  move(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !this.tokens.length) return;
    event.preventDefault();
    this.choose(Math.min(Math.max(this.chosen + step, 0), this.tokens.length - 1));
    const token = this.tokens[this.chosen];
    say(`${token.text}, ${(100 * token.probability).toFixed(1)} percent`);
  }
}

function markDifference() {
  if (outputs.length < 2) return;
  const [a, b] = outputs.map((output) => output.tokens);
  const count = Math.min(a.length, b.length);
  let place = 0;
  while (place < count && a[place].text === b[place].text) place += 1;
  const isSame = place === a.length && place === b.length;
  for (const output of outputs) {
    const token = output.tokens[place];
    if (token) token.span.classList.add("differs");
    output.note.classList.toggle("differs", !isSame);
    output.note.textContent += isSame ? ", the same text" : `, differs from token ${place + 1} on`;
  }
}

async function write(output, fields, signal) {
  const began = performance.now();
  const response = await fetch("/v1/completions", {
    method: "POST", headers: headers(), body: JSON.stringify(fields), signal,
  });
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") continue;
        const values = JSON.parse(data);
        if (values.error) throw new Error(values.error.message);
        for (const choice of values.choices) output.add(choice);
      }
    }
  } finally {
    const seconds = (performance.now() - began) / 1000;
    const count = output.tokens.length;
    output.note.textContent = `${count} tokens, ${(count / seconds).toFixed(1)} tokens/s`;
  }
}

async function start() {
  if (running || !$("form").reportValidity()) return;
  running = new AbortController();
  $("write").disabled = true;
  $("halt").disabled = false;
  $("outputs").replaceChildren();
  say("Writing");
  const fields = { prompt: $("prompt").value, stream: true, logprobs: 5 };
  for (const name of ["max_tokens", "temperature", "top_p", "seed"]) {
    if ($(name).value !== "") fields[name] = Number($(name).value);
  }
  if ($("stop").value) fields.stop = $("stop").value;
  const models = [$("model").value, $("compare").value].filter(Boolean);
  outputs = models.map((model) => new Output(model, fields.prompt));
  const work = outputs.map((output, i) => write(output, { ...fields, model: models[i] }, running.signal));
  const failed = (await Promise.allSettled(work)).find((result) => result.status === "rejected");
  const isHalted = running.signal.aborted;
  markDifference();
  if (isHalted) say("Stopped");
  else if (failed) say(failed.reason.message, true);
  else say("Done");
  running = null;
  $("write").disabled = false;
  $("halt").disabled = true;
}

function halt() {
  if (running) running.abort();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
$("halt").addEventListener("click", halt);
$("key").addEventListener("change", () => {
  $("model").replaceChildren();
  $("compare").length = 1;
  loadModels().catch((error) => say(error.message, true));
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) start();
  if (event.key === "Escape") halt();
});
loadModels().catch((error) => say(error.message, true));
