/** One request and its answer on the page. Text of the model is only ever put into text nodes. */

import { percent, runs, visible } from "./tokens.js";

const END = "end"; // shown for tokens without text

const make = (name, className, text) => {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};

export class Turn {
  /** `onSelect(turn, run)` is called with the run that was chosen, `onRetry(turn)` when the request is to be sent again. */
  constructor({ number, mode, model, request, onSelect, onRetry }) {
    Object.assign(this, { number, mode, model, request, onSelect, onRetry });
    this.element = make("article", `turn ${mode}`);
    this.element.setAttribute("aria-label", `Answer ${number}`);
    this.body = make("div", "answer");
    this.alert = make("p", "error");
    this.alert.setAttribute("role", "alert");
    this.note = make("p", "note");
    this.facts = make("p", "facts");
    this.buttons = make("div", "foot-buttons");
    const asked = make("div", "asked");
    asked.append(make("p", "who", mode === "chat" ? "You" : "Prompt"), make("p", "asked-text", request));
    const answered = make("div", "answered");
    this.foot = make("div", "foot");
    this.foot.append(this.facts, this.buttons);
    answered.append(make("p", "who", model), this.body, this.note, this.alert, this.foot);
    this.element.append(asked, answered);
    this.body.addEventListener("keydown", (event) => this.#key(event));
    this.body.addEventListener("click", (event) => {
      const span = event.target.closest(".token");
      if (span) this.select(Number(span.dataset.run));
    });
    this.begin();
  }

  /** Begin an answer. One that is there already is kept until the new one has come. */
  begin() {
    this.kept = this.runs?.length ? { ...this, nodes: [...this.body.childNodes] } : null;
    Object.assign(this, {
      state: "waiting", text: "", runs: [], selected: null, numExperts: null, usage: null, finish: null,
      startMs: performance.now(), firstMs: null, lastMs: null,
    });
    this.body.replaceChildren(make("span", "waiting", "waiting for the first token"));
    this.element.classList.remove("failed");
    for (const name of ["tabindex", "role", "aria-label"]) this.body.removeAttribute(name);
    this.body.setAttribute("aria-busy", "true");
    for (const part of [this.alert, this.note, this.facts]) part.textContent = "";
    this.buttons.replaceChildren();
  }

  get tokens() {
    return this.runs.flatMap((run) => run.tokens);
  }

  get isRunning() {
    return this.state === "waiting" || this.state === "writing";
  }

  /** Whether its text belongs to the conversation that is sent with the next message. */
  get counts() {
    return this.mode === "chat" && this.text !== "" && this.state !== "failed";
  }

  /** Take the parts of a chunk. */
  add(chunk) {
    const found = runs(chunk);
    this.numExperts = chunk.numExperts ?? this.numExperts;
    if (!found.length) return;
    this.lastMs = performance.now();
    if (this.state === "waiting") {
      this.firstMs = this.lastMs;
      this.state = "writing";
      this.body.replaceChildren();
    }
    for (const run of found) {
      run.index = this.runs.length;
      this.runs.push(run);
      this.text += run.text;
      this.body.append(this.#span(run));
    }
    this.#tell();
  }

  #span(run) {
    const span = make("span", "token", run.text || END);
    span.dataset.run = run.index;
    if (!run.text) span.classList.add("end");
    else if (run.text.includes("\n") && !run.text.trim()) span.classList.add("break");
    const known = run.tokens.filter((token) => token.logprob !== null);
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
    if (this.kept && (state === "failed" || !this.runs.length)) {
      const { state: before, text, runs, numExperts, usage, finish, startMs, firstMs, lastMs, nodes } = this.kept;
      Object.assign(this, { text, runs, numExperts, usage, finish, startMs, firstMs, lastMs });
      this.body.replaceChildren(...nodes);
      state = before;
    }
    this.kept = null;
    this.state = state;
    this.element.classList.toggle("failed", state === "failed");
    this.body.setAttribute("aria-busy", "false");
    if (!this.runs.length) this.body.replaceChildren();
    else this.#focusable();
    this.alert.textContent = error;
    this.#tell();
    const again = make("button", "", state === "failed" || error ? "Send again" : "Another answer");
    again.type = "button";
    again.addEventListener("click", () => this.onRetry(this));
    this.buttons.append(again);
    if (this.text) {
      const copy = make("button", "", "Copy");
      copy.type = "button";
      copy.addEventListener("click", async () => {
        try {
          await navigator.clipboard.writeText(this.text);
          copy.textContent = "Copied";
        } catch {
          copy.textContent = "The browser does not allow it";
        }
      });
      this.buttons.append(copy);
    }
  }

  #focusable() {
    this.body.tabIndex = 0;
    this.body.setAttribute("role", "group");
    this.body.setAttribute("aria-label", `Text of answer ${this.number}; left and right arrow keys choose a token`);
  }

  #tell() {
    const facts = [];
    const count = this.usage?.completion_tokens ?? (this.tokens.length || null);
    if (this.firstMs !== null) facts.push(["first token", `${Math.round(this.firstMs - this.startMs)} ms`]);
    if (count > 1 && this.lastMs > this.firstMs) {
      facts.push(["", `${((1000 * (count - 1)) / (this.lastMs - this.firstMs)).toFixed(1)} tokens/s`]);
    }
    if (count !== null) facts.push(["", `${count} token${count === 1 ? "" : "s"}`]);
    const ends = { stop: "ended by itself", length: "ended at the limit of tokens" };
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
    this.runs[this.selected]?.element.classList.remove("selected");
    this.selected = index;
    const run = index === null ? null : this.runs[index];
    run?.element.classList.add("selected");
    run?.element.scrollIntoView({ block: "nearest" });
    this.onSelect(this, run);
  }

  #key(event) {
    const last = this.runs.length - 1;
    const at = this.selected;
    const to = {
      ArrowRight: at === null ? 0 : Math.min(last, at + 1), ArrowLeft: at === null ? last : Math.max(0, at - 1),
      Home: 0, End: last,
    }[event.key];
    if (to === undefined || last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.select(to);
  }
}
