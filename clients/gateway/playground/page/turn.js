/** One request and its answer on the page. Text of the model is only ever put into text nodes. */

import * as calls from "./calls.js";
import { percent, runs, visible } from "./tokens.js";

const END = "end"; // shown for the last tokens, which have no text
const MARK = "·"; // shown for other tokens without text, such as those that begin the answer behind the reasoning

// What another answer puts in place of this one, and what comes back if it fails.
const ANSWER = [
  "state", "text", "thoughtText", "runs", "tokens", "calls", "results", "numExperts", "usage", "finish", "startMs",
  "firstMs", "lastMs",
];

const make = (name, className, text) => {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};

export class Turn {
  /** `asked` is what the turn adds to the conversation: OpenAI's messages of a user or of tools. `onSelect(turn, run)` is
   * called with the run that was chosen, `onRetry(turn)` when the request is to be sent again, `onEdit(turn, text)` when it
   * is to be sent with another text, and `onResults(turn, messages)` with the results of the calls that it asks for.
   * `after` is the turn whose calls `asked` has the results of. */
  constructor({ number, mode, model, asked, after, onSelect, onRetry, onEdit, onResults }) {
    Object.assign(this, { number, mode, model, asked, after, onSelect, onRetry, onEdit, onResults });
    this.element = make("article", `turn ${mode}`);
    this.element.setAttribute("aria-label", `Answer ${number}`);
    this.body = make("div", "answer");
    this.alert = make("p", "error");
    this.alert.setAttribute("role", "alert");
    this.note = make("p", "note");
    this.facts = make("p", "facts");
    this.buttons = make("div", "foot-buttons");
    this.askedBox = make("div", "asked");
    this.thought = make("div", "thought");
    this.reasoning = make("details", "reasoning");
    this.reasoningTitle = make("summary");
    this.reasoning.append(this.reasoningTitle, this.thought);
    this.callsBox = make("div", "calls");
    const answered = make("div", "answered");
    this.foot = make("div", "foot");
    this.foot.append(this.facts, this.buttons);
    answered.append(
      make("p", "who", model), this.reasoning, this.body, this.callsBox, this.note, this.alert, this.foot,
    );
    this.element.append(this.askedBox, answered);
    for (const place of [this.thought, this.body]) {
      place.addEventListener("keydown", (event) => this.#key(event));
      place.addEventListener("click", (event) => {
        const span = event.target.closest(".token");
        if (span) this.select(Number(span.dataset.run));
      });
    }
    this.#showAsked();
    this.begin();
  }

  /** The text that was asked, or the results that were given. */
  get request() {
    return this.asked.map((message) => message.content).join("\n");
  }

  #showAsked() {
    const who = this.mode === "completion" ? "Prompt" : this.asked[0].role === "tool" ? "Result" : "You";
    this.askedBox.replaceChildren(make("p", "who", who), make("p", "asked-text", this.request));
  }

  /** Let the text that was asked be written anew, in its place. */
  #edit() {
    const field = make("textarea", "edit");
    field.value = this.request;
    field.setAttribute("aria-label", `Message ${this.number}`);
    const again = make("button", "main", "Send");
    const leave = make("button", "", "Cancel");
    for (const button of [again, leave]) button.type = "button";
    const close = () => {
      this.#showAsked();
      this.buttons.querySelector(".edit-button")?.focus();
    };
    again.addEventListener("click", () => field.value.trim() && this.onEdit(this, field.value));
    leave.addEventListener("click", close);
    field.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        again.click();
      }
    });
    const buttons = make("div", "foot-buttons");
    buttons.append(again, leave);
    this.askedBox.replaceChildren(field, buttons);
    field.focus();
  }

  /** Ask something else. The answer to the old text goes. */
  askInstead(text) {
    this.asked = [{ ...this.asked[0], content: text }];
    this.#showAsked();
    this.runs = [];
    this.calls = [];
  }

  /** Begin an answer. One that is there already is kept until the new one has come. */
  begin() {
    const nodes = [this.thought, this.body].map((place) => [...place.childNodes]);
    this.kept = this.runs?.length || this.calls?.length ? { nodes } : null;
    for (const name of this.kept ? ANSWER : []) this.kept[name] = this[name];
    Object.assign(this, {
      state: "waiting", text: "", thoughtText: "", runs: [], tokens: [], calls: [], results: undefined, selected: null,
      numExperts: null, usage: null, finish: null, startMs: performance.now(), firstMs: null, lastMs: null,
    });
    this.unshown = []; // runs that are not on the page yet
    this.isReasoning = false; // whether the last text was
    this.thought.replaceChildren();
    this.reasoning.hidden = true;
    this.callsBox.replaceChildren();
    this.body.replaceChildren(make("span", "waiting", "waiting for the first token"));
    this.element.classList.remove("failed");
    for (const place of [this.thought, this.body]) {
      for (const name of ["tabindex", "role", "aria-label"]) place.removeAttribute(name);
    }
    this.body.setAttribute("aria-busy", "true");
    for (const part of [this.alert, this.note, this.facts]) part.textContent = "";
    this.buttons.replaceChildren();
  }

  get isRunning() {
    return this.state === "waiting" || this.state === "writing";
  }

  /** Whether it has the results of calls that another answer has replaced. */
  get isCutOff() {
    return Boolean(this.after) && (this.after.results !== this.asked || this.after.isCutOff);
  }

  /** Say why the request is not sent again. */
  refuse(reason) {
    this.alert.textContent = reason;
  }

  /** Whether its text belongs to the conversation that is sent with the next message. */
  get counts() {
    return !this.isCutOff && this.mode === "chat" && (this.text !== "" || this.results !== undefined) && this.state !== "failed";
  }

  /** What the turn adds to a conversation that goes on. Calls without a result are left out, since templates and models
   * want one for each. The reasoning behind a call goes along, as a model is trained to go on from it, while that of an
   * answer is left out; `isOpen` says that no message of a user has come since. */
  messages(isOpen) {
    const answer = { role: "assistant", content: this.text };
    if (this.results === undefined) return [...this.asked, answer];
    if (isOpen && this.thoughtText) answer.reasoning_content = this.thoughtText;
    return [...this.asked, { ...answer, content: this.text || null, tool_calls: calls.asked(this.calls) }];
  }

  /** Take the parts of a chunk. They are on the page after `show`. */
  add(chunk) {
    const found = runs(chunk);
    this.numExperts = chunk.numExperts ?? this.numExperts;
    calls.addTo(this.calls, chunk.calls);
    if (!found.length && !chunk.calls.length) return;
    this.lastMs = performance.now();
    if (this.state === "waiting") {
      this.firstMs = this.lastMs;
      this.state = "writing";
    }
    for (const run of found) {
      this.tokens.push(...run.tokens);
      const before = this.unshown.at(-1);
      if (!run.text && !chunk.isLast && before && !before.text) {
        before.tokens.push(...run.tokens); // one mark for all of them
        continue;
      }
      if (run.text) this.isReasoning = chunk.isReasoning;
      Object.assign(run, { index: this.runs.length, isReasoning: this.isReasoning, isEnd: !run.text && chunk.isLast });
      // Marks before a text belong to it.
      if (run.text) this.unshown.forEach((one) => { if (!one.text) one.isReasoning = this.isReasoning; });
      this.runs.push(run);
      this.unshown.push(run);
      if (run.isReasoning) this.thoughtText += run.text;
      else this.text += run.text;
    }
  }

  /** Put on the page what came since. */
  show() {
    if (this.state === "waiting") return;
    if (this.body.firstChild?.className === "waiting") this.body.replaceChildren();
    const last = this.state === "writing" ? this.unshown.findLastIndex((run) => run.text) : this.unshown.length - 1;
    const shown = this.unshown.splice(0, last + 1).map((run) => [run, this.#span(run)]);
    this.thought.append(...shown.filter(([run]) => run.isReasoning).map(([, span]) => span));
    this.body.append(...shown.filter(([run]) => !run.isReasoning).map(([, span]) => span));
    this.#showReasoning();
    if (this.calls.length) calls.show(this.callsBox, this.calls, `answer ${this.number}`);
    this.#tell();
  }

  #showReasoning() {
    this.reasoning.hidden = !this.thoughtText;
    const isNow = this.state === "writing" && this.isReasoning;
    const count = this.runs.reduce((sum, run) => sum + (run.isReasoning && run.text ? Math.max(1, run.tokens.length) : 0), 0);
    this.reasoningTitle.textContent = isNow ? "Reasoning …" : `Reasoning, ${count} token${count === 1 ? "" : "s"}`;
  }

  #span(run) {
    const span = make("span", "token", run.text || (run.isEnd ? END : MARK));
    span.dataset.run = run.index;
    if (!run.text) span.classList.add(run.isEnd ? "end" : "mark");
    else if (run.text.includes("\n") && !run.text.trim()) span.classList.add("break");
    const isMark = !run.text && !run.isEnd;
    const known = isMark ? [] : run.tokens.filter((token) => token.logprob !== null);
    if (known.length) {
      const likely = Math.exp(known.reduce((sum, token) => sum + token.logprob, 0));
      span.style.setProperty("--doubt", Math.min(1, -Math.log10(likely) / 2).toFixed(3));
      if (likely < 0.1) span.classList.add("unlikely");
      span.title = `${visible(run.text)} ${percent(Math.log(likely))}`;
    }
    run.element = span;
    return span;
  }

  /** The answer ended: `state` is done, stopped or failed. */
  end(state, error = "") {
    const isEmpty = !this.runs.length && !this.calls.length;
    if (this.kept && (state === "failed" || isEmpty)) {
      const { nodes, ...answer } = this.kept;
      state = answer.state;
      Object.assign(this, answer);
      this.unshown = [];
      this.thought.replaceChildren(...nodes[0]);
      this.body.replaceChildren(...nodes[1]);
    }
    this.kept = null;
    this.state = state;
    this.show();
    this.element.classList.toggle("failed", state === "failed");
    this.body.setAttribute("aria-busy", "false");
    if (this.body.firstChild?.className === "waiting") this.body.replaceChildren();
    if (this.body.firstChild) this.#focusable(this.body, "text");
    if (this.thought.firstChild) this.#focusable(this.thought, "reasoning");
    if (this.calls.length) {
      const give = this.results === undefined && state === "done" ? (texts) => this.#giveResults(texts) : null;
      calls.show(this.callsBox, this.calls, `answer ${this.number}`, give);
    }
    this.alert.textContent = error;
    this.#tell();
    const again = make("button", "", state === "failed" || error ? "Send again" : "Another answer");
    again.type = "button";
    again.addEventListener("click", () => this.onRetry(this));
    this.buttons.append(again);
    if (this.asked[0].role === "user") {
      const edit = make("button", "edit-button", "Edit");
      edit.type = "button";
      edit.setAttribute("aria-label", `Edit message ${this.number}`);
      edit.addEventListener("click", () => this.#edit());
      this.buttons.append(edit);
    }
    if (this.text || this.calls.length) {
      const copy = make("button", "", "Copy");
      copy.type = "button";
      copy.addEventListener("click", async () => {
        try {
          await navigator.clipboard.writeText([this.text, calls.sentence(this.calls)].filter(Boolean).join("\n"));
          copy.textContent = "Copied";
        } catch {
          copy.textContent = "The browser does not allow it";
        }
      });
      this.buttons.append(copy);
    }
  }

  #giveResults(texts) {
    const messages = this.calls.map(({ id }, place) => ({ role: "tool", tool_call_id: id, content: texts[place] }));
    if (!this.onResults(this, messages)) return;
    this.results = messages;
    calls.show(this.callsBox, this.calls, `answer ${this.number}`);
  }

  #focusable(place, name) {
    place.tabIndex = 0;
    place.setAttribute("role", "group");
    place.setAttribute("aria-label", `The ${name} of answer ${this.number}; left and right arrow keys choose a token`);
  }

  #tell() {
    const facts = [];
    const count = this.usage?.completion_tokens ?? (this.tokens.length || null);
    if (this.firstMs !== null) facts.push(["first token", `${Math.round(this.firstMs - this.startMs)} ms`]);
    if (count > 1 && this.lastMs > this.firstMs) {
      facts.push(["", `${((1000 * (count - 1)) / (this.lastMs - this.firstMs)).toFixed(1)} tokens/s`]);
    }
    if (count !== null) facts.push(["", `${count} token${count === 1 ? "" : "s"}`]);
    const ends = { stop: "ended by itself", length: "ended at the limit of tokens", tool_calls: "ended with calls" };
    if (this.state === "stopped") facts.push(["", "stopped"]);
    else if (this.state === "done" && this.finish) facts.push(["", ends[this.finish] ?? this.finish]);
    this.facts.replaceChildren(
      ...facts.map(([name, value]) => {
        const one = make("span");
        if (name) one.append(`${name} `);
        one.append(make("b", "", value));
        return one;
      }),
    );
  }

  /** Choose a run by its number, or none. */
  select(index) {
    this.runs[this.selected]?.element?.classList.remove("selected");
    this.selected = index;
    const run = index === null ? null : this.runs[index];
    run?.element?.classList.add("selected");
    if (run?.isReasoning) this.reasoning.open = true;
    run?.element?.scrollIntoView({ block: "nearest" });
    this.onSelect(this, run);
  }

  #key(event) {
    const own = this.runs.filter((run) => run.isReasoning === (event.currentTarget === this.thought));
    const last = own.length - 1;
    const found = own.findIndex((run) => run.index === this.selected);
    const at = found < 0 ? null : found;
    const to = {
      ArrowRight: at === null ? 0 : Math.min(last, at + 1), ArrowLeft: at === null ? last : Math.max(0, at - 1),
      Home: 0, End: last,
    }[event.key];
    if (to === undefined || last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.select(own[to].index);
  }
}
