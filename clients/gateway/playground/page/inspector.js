/** The panel's view of one answer: the chosen token's alternatives, and the experts of all tokens. */

import { colour, drawLoad, drawMap, load, summary } from "./routing.js";
import { percent, visible } from "./tokens.js";

const part = (id) => document.getElementById(id);
const make = (name, className, text) => {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};

const PAUSE_MS = 150;
let shown = null; // the turn
let planned = false;

export const isShown = (turn) => shown === turn;

/** Show an answer and one of its runs, or none. */
export function show(turn, run = null) {
  shown = turn;
  part("token").hidden = !run;
  part("no-token").hidden = Boolean(run);
  if (run) describe(run);
  draw();
}

/** Draw again soon. An answer is drawn a few times a second while it is written. */
export function refresh() {
  if (planned) return;
  planned = true;
  setTimeout(() => {
    planned = false;
    draw();
  }, PAUSE_MS);
}

/** One sentence of a run for those who do not see the panel. */
export function sentence(run) {
  const of = run.tokens.map((token) => (token.logprob === null ? "" : percent(token.logprob))).filter(Boolean);
  const experts = run.tokens.at(-1)?.routing;
  const told = experts ? `, experts of the first layer ${experts[0].map(([expert]) => expert).join(" and ")}` : "";
  return `${run.text.trim() ? run.text : visible(run.text)}${of.length ? `, ${of.join(" and ")}` : ""}${told}`;
}

function describe(run) {
  part("token-title").textContent = run.text ? `“${visible(run.text)}”` : "The answer's end";
  const blocks = run.tokens.map((token) => {
    const block = make("div", "block");
    if (run.tokens.length > 1) block.append(make("h3", "", `token “${visible(token.text)}”`));
    if (token.logprob === null) {
      block.append(make("p", "small", "Its probability was not asked for, or the model does not give it."));
      return block;
    }
    const others = token.alternatives.filter((other) => other.text !== token.text);
    const rows = [{ text: token.text, logprob: token.logprob, own: true }, ...others];
    rows.sort((a, b) => b.logprob - a.logprob);
    const table = make("table", "likely");
    const head = make("caption", "hidden", "The chosen token and the likeliest others at its place");
    const body = make("tbody");
    for (const row of rows) {
      const line = make("tr", row.own ? "own" : "");
      const name = make("th");
      name.scope = "row";
      name.append(make("code", "", visible(row.text)));
      if (row.own) name.append(make("span", "hidden", " chosen"));
      const value = make("td", "", percent(row.logprob));
      const bar = make("td", "bar");
      bar.setAttribute("aria-hidden", "true");
      const fill = make("i");
      fill.style.setProperty("width", `${(100 * Math.exp(row.logprob)).toFixed(2)}%`);
      bar.append(fill);
      line.append(name, value, bar);
      body.append(line);
    }
    table.append(head, body);
    block.append(table);
    return block;
  });
  if (!blocks.length) blocks.push(make("p", "small", "The server said nothing of this text's tokens."));
  part("alternatives").replaceChildren(...blocks);
}

/** Draw the experts of the answer's tokens, if the panel shows them. */
export function draw() {
  if (part("tokens").hidden) return;
  const tokens = shown?.tokens ?? [];
  const routed = tokens.some((token) => token.routing);
  part("experts").hidden = !routed;
  if (!routed) return;
  const seen = tokens.flatMap((token) => token.routing?.flat() ?? []).reduce((most, [one]) => Math.max(most, one), 0);
  const count = Math.max(shown.numExperts ?? 0, seen + 1);
  const selected = shown.runs[shown.selected]?.tokens.at(-1) ?? null;
  const counts = load(tokens, count);
  const perToken = tokens.find((token) => token.routing).routing[0].length;
  part("experts-note").textContent =
    `${counts.length} layers of ${count} experts, of which each token uses ${perToken}. ${summary(counts)}`;
  drawMap(part("map"), tokens, count, selected);
  drawLoad(part("load"), counts, tokens.filter((token) => token.routing).length, selected);
  part("legend").replaceChildren(
    ...(count > 8 ? [] : Array.from({ length: count }, (_, expert) => {
      const item = make("li", "", `expert ${expert}`);
      item.style.setProperty("--swatch", colour(expert, count));
      return item;
    })),
  );
  part("layers").replaceChildren(...(selected?.routing ? [layerTable(selected)] : []));
}

function layerTable(token) {
  const table = make("table", "layers");
  table.append(make("caption", "", `The experts of “${visible(token.text)}”`));
  const head = make("thead");
  const names = make("tr");
  for (const name of ["layer", "experts and their weights"]) {
    const cell = make("th", "", name);
    cell.scope = "col";
    names.append(cell);
  }
  head.append(names);
  const body = make("tbody");
  token.routing.forEach((chosen, layer) => {
    const row = make("tr");
    const number = make("th", "", String(layer));
    number.scope = "row";
    const cell = make("td");
    for (const [expert, weight] of chosen) {
      cell.append(make("span", "expert", `${expert}`), make("span", "weight", ` ${Math.round(100 * weight)} %`));
    }
    row.append(number, cell);
    body.append(row);
  });
  table.append(head, body);
  return table;
}

/** Choose the token under the pointer in the map. */
part("map").addEventListener("click", (event) => {
  const column = Math.floor(event.offsetX / Number(event.target.dataset.wide));
  const token = shown?.tokens[column];
  const run = shown?.runs.find((one) => one.tokens.includes(token));
  if (run) shown.select(run.index);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", refresh);
