/** The page: fields in, requests out, answers as they are written. Nothing is stored; a key lives in its field alone. */

import { chunks, models, ShownError } from "./api.js";
import * as calls from "./calls.js";
import * as inspector from "./inspector.js";
import * as settings from "./settings.js";
import { parts } from "./tokens.js";
import { Turn } from "./turn.js";

const part = (id) => document.getElementById(id);
const prompt = part("prompt");
// What the page asks for by itself: a model that has no such thing is asked without it.
const WISHES = {
  return_routed_experts: "This model gives no experts: it has none, or its server does not tell them.",
  logprobs: "The gateway has no tokenizer of this model, and so gives no probabilities.",
};
const SHOW_MS = 40;
const MOST_SAID = 1500; // characters; nobody wants to hear more at once, and the answer itself can be read
const ENDPOINTS = { chat: "v1/chat/completions", completion: "v1/completions" };

let facts = new Map(); // model to what the gateway says of it
let turns = [];
let cleared = [];
let number = 0;
let running = null; // { turn, abort }

const mode = () => document.querySelector("input[name=mode]:checked").value;
const say = (text) => {
  part("status").textContent = text;
};

// Models.

async function readModels() {
  const select = part("model");
  const before = select.value;
  try {
    const found = await models(settings.key());
    facts = new Map(found.map((model) => [model.id, model.moeship ?? {}]));
    select.replaceChildren(...found.map(({ id }) => new Option(id, id)));
    if (!found.length) select.replaceChildren(new Option("no model is ready", ""));
    if (facts.has(before)) select.value = before;
    part("trouble")?.remove();
    suit();
  } catch (error) {
    select.replaceChildren(new Option("no models", ""));
    trouble(error.message);
  }
}

/** Show what suits the model: one without a chat template can only complete a text. */
function suit() {
  const { chat, logprobs, return_routed_experts: routing } = facts.get(part("model").value) ?? {};
  const chats = document.querySelector("input[value=chat]");
  chats.disabled = chat === false;
  chats.parentElement.title = chat === false ? "This model has no chat template" : "";
  if (chats.disabled && chats.checked) {
    document.querySelector("input[value=completion]").checked = true;
    changeMode();
  }
  for (const [id, has] of [["logprobs", logprobs], ["routing", routing]]) {
    part(id).disabled = has === false;
    part(id).parentElement.title = has === false ? "This model does not give them" : "";
  }
}

function changeMode() {
  const isChat = mode() === "chat";
  part("prompt-label").textContent = isChat ? "Message" : "Text to continue";
  prompt.placeholder = isChat ? "Message" : "Text to continue";
  part("lead").textContent = isChat ? "Ask the model something." : "Begin a text that the model continues.";
  for (const element of document.querySelectorAll(".chat-only")) element.hidden = !isChat;
}

/** A message above the composer that stays until its cause is gone. */
function trouble(text) {
  part("trouble")?.remove();
  const box = document.createElement("div");
  box.id = "trouble";
  box.setAttribute("role", "alert");
  const message = document.createElement("p");
  message.className = "error";
  message.textContent = text;
  const again = document.createElement("button");
  again.type = "button";
  again.textContent = "Try again";
  again.addEventListener("click", readModels);
  box.append(message, again);
  part("composer").before(box);
}

// Requests.

function body(turn, without) {
  const found = { model: turn.model, ...settings.fields(turn.mode) };
  for (const name of without) delete found[name];
  if (without.has("logprobs")) delete found.top_logprobs;
  if (turn.mode === "completion") return { ...found, prompt: turn.request };
  const messages = settings.system() ? [{ role: "system", content: settings.system() }] : [];
  const until = turns.slice(0, turns.indexOf(turn) + 1);
  const lastAsked = until.findLastIndex((one) => one.asked[0].role === "user");
  until.pop();
  until.forEach((before, place) => {
    if (before.counts) messages.push(...before.messages(place >= lastAsked));
  });
  messages.push(...turn.asked);
  return { ...found, messages };
}

/** Which of WISHES a refusal is about, if any. */
function refusedWish(error) {
  if (!(error instanceof ShownError) || error.status !== 400) return null;
  if (error.code === "no_tokenizer") return "logprobs";
  return Object.keys(WISHES).find((name) => error.param === name || error.message.includes(`${name}: `)) ?? null;
}

async function run(turn) {
  const abort = new AbortController();
  running = { turn, abort };
  busy(true);
  turn.begin();
  inspector.show(turn);
  say("The answer is being written.");
  const without = new Set();
  // What ends an answer changes its height, and so whether the end of the text is in view.
  const ending = (state, error) => atEnd(() => turn.end(state, error));
  try {
    for (;;) {
      try {
        await read(turn, body(turn, without), abort.signal);
        break;
      } catch (error) {
        const wish = turn.runs.length ? null : refusedWish(error);
        if (!wish || without.has(wish)) throw error;
        without.add(wish);
        turn.note.textContent = WISHES[wish];
      }
    }
    ending("done");
    const told = [turn.text, calls.sentence(turn.calls)].filter(Boolean).join("\n");
    const isLong = told.length > MOST_SAID;
    say(`Answer ${turn.number} has ended, ${turn.tokens.length} tokens${isLong ? "" : `: ${told}`}`);
  } catch (error) {
    if (error.name === "AbortError") {
      ending("stopped");
      say("The answer was stopped.");
    } else {
      const known = error instanceof ShownError;
      if (!known) console.error(error);
      ending("failed", known ? error.message : "The page failed. The browser's console has the reason.");
    }
  } finally {
    running = null;
    busy(false);
    inspector.refresh();
  }
}

async function read(turn, request, signal) {
  let planned = null;
  let wasReasoning = null;
  // The page is laid out a few times a second, however many chunks come.
  const show = () => {
    planned = null;
    atEnd(() => turn.show());
    if (inspector.isShown(turn)) inspector.refresh();
  };
  try {
    for await (const chunk of chunks(ENDPOINTS[turn.mode], request, settings.key(), signal)) {
      if (chunk.usage) turn.usage = chunk.usage;
      const [choice] = chunk.choices ?? [];
      if (!choice) continue;
      if (choice.finish_reason) turn.finish = choice.finish_reason;
      turn.add(parts(choice));
      if (turn.isReasoning !== (wasReasoning ?? false)) say(turn.isReasoning ? "The model reasons." : "It answers.");
      wasReasoning = turn.isReasoning;
      planned ??= setTimeout(show, SHOW_MS);
    }
  } finally {
    clearTimeout(planned);
  }
}

function send() {
  const text = prompt.value;
  if (running || !text.trim()) return;
  if (ask(part("model").value, mode(), [{ role: "user", content: text }])) prompt.value = "";
}

/** Whether something can be sent; else the page says why not. */
function isReady(model, kind) {
  const wrong = settings.problem(kind);
  if (wrong) {
    openPanel("settings");
    wrong.input.focus();
    wrong.input.setAttribute("aria-invalid", "true");
    wrong.input.reportValidity();
    say(wrong.text);
    return false;
  }
  if (!model) trouble("There is no model to ask. Start one, or look whether the gateway reaches its server.");
  return Boolean(model);
}

/** Ask a model, in a turn of its own: at the end, or behind the turn whose calls `asked` has the results of. Returns
 * whether it is asked. */
function ask(model, kind, asked, after = null) {
  if (running || !isReady(model, kind)) return false;
  cleared = [];
  part("clear").textContent = "Clear";
  number += 1;
  const turn = new Turn({
    number, mode: kind, model, asked, after, onSelect: selected, onRetry: again, onEdit: edited, onResults: resulted,
  });
  turns.splice(after ? turns.indexOf(after) + 1 : turns.length, 0, turn);
  if (after) after.element.after(turn.element);
  else part("turns").append(turn.element);
  part("turns").hidden = false;
  part("empty").hidden = true;
  if (turn === turns.at(-1)) toEnd();
  // The caller may still have something to note before the request is made of the turns.
  queueMicrotask(() => run(turn));
  return true;
}

/** Ask once more. What came after the answer stays, since it was said. */
function again(turn) {
  if (running || !isReady(turn.model, turn.mode)) return;
  if (turn.isCutOff) turn.refuse("The calls that these results belong to have been replaced. Ask again from there.");
  else run(turn);
}

/** Ask with another text, in the same place. */
function edited(turn, text) {
  if (running || !isReady(turn.model, turn.mode)) return;
  turn.askInstead(text);
  run(turn);
  prompt.focus();
}

/** Go on with the results of a turn's calls. */
function resulted(turn, messages) {
  const isAsked = ask(turn.model, turn.mode, messages, turn);
  if (isAsked) prompt.focus();
  return isAsked;
}

function selected(turn, chosen) {
  for (const other of turns) if (other !== turn && other.selected !== null) unselect(other);
  inspector.show(turn, chosen);
  if (!chosen) return;
  openPanel("tokens");
  say(inspector.sentence(chosen));
}

function unselect(turn) {
  turn.runs[turn.selected]?.element?.classList.remove("selected");
  turn.selected = null;
}

function busy(is) {
  const hadFocus = document.activeElement === part("stop") || document.activeElement === part("send");
  part("send").hidden = is;
  part("stop").hidden = !is;
  if (hadFocus) prompt.focus();
}

// Scrolling: the page follows the text while its end is in view, and stays where it is for whoever reads further up.

function toEnd() {
  part("turns").scrollTop = part("turns").scrollHeight;
}

function atEnd(change) {
  const box = part("turns");
  const was = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  change();
  if (was) toEnd();
}

// The panel.

function openPanel(name) {
  for (const tab of ["settings", "tokens"]) {
    const is = tab === name;
    part(tab).hidden = !is;
    part(`tab-${tab}`).setAttribute("aria-selected", String(is));
    part(`tab-${tab}`).tabIndex = is ? 0 : -1;
  }
  document.body.classList.add("panel-open");
  part("panel-toggle").setAttribute("aria-expanded", "true");
  if (name === "tokens") inspector.draw();
}

function closePanel() {
  document.body.classList.remove("panel-open");
  part("panel-toggle").setAttribute("aria-expanded", "false");
}

const tabs = [part("tab-settings"), part("tab-tokens")];
tabs.forEach((tab, index) => {
  tab.addEventListener("click", () => openPanel(tab.getAttribute("aria-controls")));
  tab.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowRight" && event.key !== "ArrowLeft") return;
    const other = tabs[1 - index];
    other.click();
    other.focus();
  });
});
part("panel-close").addEventListener("click", () => {
  closePanel();
  part("panel-toggle").focus();
});
part("panel-toggle").addEventListener("click", () => {
  if (document.body.classList.contains("panel-open") && !part("settings").hidden) closePanel();
  else openPanel("settings");
});

// Fields.

part("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (running) say("The answer is still being written; Escape stops it.");
  send();
});
part("stop").addEventListener("click", () => running?.abort.abort());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (running) running.abort.abort();
  else closePanel();
});
part("settings").addEventListener("submit", (event) => event.preventDefault());
part("settings").addEventListener("input", (event) => {
  event.target.removeAttribute("aria-invalid");
  event.target.setCustomValidity("");
});
part("model").addEventListener("change", suit);
part("key").addEventListener("change", readModels);
for (const radio of document.querySelectorAll("input[name=mode]")) {
  radio.addEventListener("change", changeMode);
}
part("clear").addEventListener("click", () => {
  if (running) {
    say("An answer is being written; stop it first.");
    return;
  }
  [turns, cleared] = [cleared, turns];
  part("turns").replaceChildren(...turns.map((turn) => turn.element));
  part("turns").hidden = turns.length === 0;
  part("empty").hidden = turns.length > 0;
  part("clear").textContent = cleared.length && !turns.length ? "Undo" : "Clear";
  inspector.show(turns.at(-1) ?? null);
  say(turns.length ? "The answers are back." : "The answers were removed; the same button brings them back.");
});

readModels();
prompt.focus();
