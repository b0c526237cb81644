// The page: settings in, requests out, and the turns of the talk on the screen.

import { Answer } from "./answer.js";
import { ApiError, get, setKey } from "./api.js";
import { recall, remember } from "./memory.js";

const $ = (id) => document.getElementById(id);
const EXAMPLES = {
  chat: ["Explain recursion in one sentence.", "Write a haiku about caches."],
  text: ["def fibonacci(n):", "class Stack:", "import "],
};

let facts = null; // what /model says, once it has answered
let asking = false; // whether /model has yet to answer
let early = false; // whether a text was sent before the facts were there; it is sent when they come
let messages = []; // the chat so far, as the API takes it
let running = null; // AbortController of the answers that are streaming, null when none is

// Settings

function number(id) {
  const value = $(id).value.trim();
  return value === "" || Number.isNaN(Number(value)) ? null : Number(value);
}

function sampling() {
  const seed = number("seed") ?? Math.floor(Math.random() * 2 ** 32); // one for both answers: they differ by T alone
  const body = {
    model: facts.name,
    temperature: number("temperature"),
    top_p: number("top-p"),
    max_tokens: number("max-tokens"),
    seed,
  };
  if ($("stop").value) body.stop = $("stop").value.replaceAll("\\n", "\n");
  return body;
}

// The loop counts of the dials; "auto", where tokens leave the loop by themselves, is the place before 1.
function loopCounts() {
  const ids = $("compare").checked ? ["loops-a", "loops-b"] : ["loops-a"];
  return ids.map((id) => number(id) || "auto");
}

function showValues() {
  for (const id of ["temperature", "top-p"]) $(`${id}-value`).textContent = $(id).value;
  for (const id of ["loops-a", "loops-b"]) {
    $(`${id}-value`).textContent = number(id) || "auto";
    $(id).setAttribute("aria-valuetext", $(`${id}-value`).textContent);
  }
  $("second-dial").hidden = !$("compare").checked;
}

// Turns

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

// Whether the end of the log is in view; only then does the log follow new text.
function atEnd() {
  const log = $("log");
  return log.scrollHeight - log.scrollTop - log.clientHeight < 40;
}

async function send(text) {
  if (running || (facts.chat && !text.trim())) return;
  $("empty").hidden = true;
  $("prompt").value = "";
  // The conversation goes on from the answers that were kept; choosing another one now would leave out what follows them.
  if (facts.chat) for (const button of $("log").querySelectorAll(".again")) button.remove();
  const turn = element("div", facts.chat ? "turn chat" : "turn", "");
  if (facts.chat) turn.append(element("p", "prompt", text));
  const place = element("div", "answers", "");
  const answers = loopCounts().map(
    (loops) => new Answer(`T = ${loops}`, loops, facts.chat ? null : text, facts.num_loops),
  );
  place.append(...answers.map((answer) => answer.element));
  turn.append(place);
  $("log").append(turn);
  $("log").scrollTop = $("log").scrollHeight;

  const asked = [...messages, { role: "user", content: text }];
  const [path, body] = facts.chat
    ? ["/v1/chat/completions", { ...sampling(), messages: asked }]
    : ["/v1/completions", { ...sampling(), prompt: text }];
  running = new AbortController();
  setBusy(true);
  let follow = true;
  const grown = () => {
    if (follow) $("log").scrollTop = $("log").scrollHeight;
  };
  $("log").onscroll = () => (follow = atEnd());
  const results = await Promise.allSettled(answers.map((answer) => answer.run(path, body, running.signal, grown)));
  running = null;
  setBusy(false);
  for (const result of results) if (result.reason instanceof ApiError && result.reason.status === 401) askForKey();
  if (!turn.isConnected) return; // the page has begun anew, without this turn
  finish(text, answers, asked);
  grown();
}

// What a person can do after a turn: a base model's texts can be continued; of two answers in a chat, one is chosen to stay
// in the conversation, the first unless another is.
function finish(text, answers, asked) {
  const written = answers.filter((answer) => answer.text);
  if (!written.length && !$("prompt").value) $("prompt").value = text;
  if (!facts.chat) {
    for (const answer of written) {
      answer.offer("Go on from here", () => {
        $("prompt").value = text + answer.text;
        $("prompt").focus();
      });
    }
    return;
  }
  const keep = (answer) => {
    messages = [...asked, { role: "assistant", content: answer.text }];
    for (const one of answers) one.element.classList.toggle("kept", one === answer && answers.length > 1);
  };
  if (written.length) keep(written[0]);
  if (written.length > 1) for (const answer of written) answer.offer("Go on with this one", () => keep(answer));
}

function setBusy(busy) {
  const held = [document.body, $("send"), $("stop-all")].includes(document.activeElement); // else someone works elsewhere
  $("send").hidden = busy;
  $("stop-all").hidden = !busy;
  if (!busy && held) $("prompt").focus({ preventScroll: true });
}

function stop() {
  running?.abort();
}

function clear() {
  stop();
  messages = [];
  for (const turn of document.querySelectorAll(".turn")) turn.remove();
  $("empty").hidden = false;
  $("prompt").focus();
}

// The model

function short(count) {
  if (count >= 1e9) return `${(count / 1e9).toFixed(1)}B`;
  if (count >= 1e6) return `${(count / 1e6).toFixed(1)}M`;
  return `${Math.round(count / 1e3)}K`;
}

// Asks what the model is, and fits the page to it. Called again when a key has been given.
async function begin() {
  asking = true;
  try {
    facts = await get("/model");
  } catch (error) {
    const asksForKey = error.status === 401;
    const why = asksForKey && !$("key").value ? "This server asks for an API key" : `No model: ${error.message}`;
    $("empty-text").textContent = `${why}.`;
    if (asksForKey) askForKey();
    return;
  } finally {
    asking = false;
  }
  document.title = facts.name;
  $("model-name").textContent = facts.name;
  $("model-facts").textContent = [
    `${short(facts.parameters)} parameters`,
    ...facts.stages,
    ...(facts.window ? [`window ${facts.window}`] : []),
  ].join(" · ");
  for (const [id, value] of [
    ["loops-a", facts.auto_by_default ? 0 : facts.num_loops],
    ["loops-b", Math.max(1, facts.num_loops - 1)],
  ]) {
    $(id).min = facts.auto_loops ? 0 : 1;
    $(id).max = facts.max_num_loops;
    $(id).value = value;
  }
  const auto = facts.auto_loops
    ? " At auto, each token leaves the loop when another one would hardly change it; the darker a token, the more loops it ran."
    : "";
  $("loops-note").textContent =
    `The model's own T is ${facts.num_loops}. More loops cost time, and little cache.${auto}`;
  $("max-tokens").max = facts.max_output_tokens;
  $("max-tokens").value = Math.min(Number($("max-tokens").value), facts.max_output_tokens);
  $("send").textContent = facts.chat ? "Send" : "Continue";
  $("prompt").placeholder = facts.chat ? "Write to the model" : "A text for the model to continue";
  $("empty-text").textContent = facts.chat ? "Ask something." : "This is a base model: it continues what you write.";
  const examples = facts.chat ? EXAMPLES.chat : EXAMPLES.text;
  $("examples").replaceChildren(...examples.map(example));
  showValues();
  if (early) send($("prompt").value);
  early = false;
}

function example(text) {
  const item = document.createElement("li");
  const button = element("button", "", text);
  button.type = "button";
  button.onclick = () => send(text);
  item.append(button);
  return item;
}

function askForKey() {
  $("settings").open = true;
  $("connection").hidden = false;
  $("key").focus();
}

// Controls

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

function submit(event) {
  event.preventDefault();
  if (facts) return void send($("prompt").value);
  early = true;
  if (!asking) begin();
}

$("composer").addEventListener("submit", submit);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing) stop();
  if (event.altKey && event.key.toLowerCase() === "n") clear();
});
$("stop-all").addEventListener("click", stop);
$("clear").addEventListener("click", clear);
$("theme").addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  setTheme(theme);
  remember("localStorage", "theme", theme);
});
$("settings").addEventListener("input", showValues);
$("key").addEventListener("change", () => {
  setKey($("key").value);
  begin();
});

const dark = matchMedia("(prefers-color-scheme: dark)");
setTheme(recall("localStorage", "theme") ?? (dark.matches ? "dark" : "light"));
dark.addEventListener("change", () => {
  if (!recall("localStorage", "theme")) setTheme(dark.matches ? "dark" : "light");
});
const narrow = matchMedia("(max-width: 52rem)"); // where settings can be folded
narrow.addEventListener("change", () => ($("settings").open = !narrow.matches));
$("settings").open = !narrow.matches;
begin();
