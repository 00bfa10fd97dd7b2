/** Calls of tools: what an answer asks for, and the field in which whoever looks gives the result. Text of the model is
 * only ever put into text nodes. */

const make = (name, className, text) => {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};

/** Add what a chunk says of calls. Calls: id, name, and the arguments as text. */
export function addTo(calls, added) {
  for (const { index, id, function: named } of added) {
    calls[index] ??= { id: "", name: "", text: "" };
    if (id) calls[index].id = id;
    calls[index].name += named?.name ?? "";
    calls[index].text += named?.arguments ?? "";
  }
}

/** The calls as OpenAI's API has them in a message. */
export const asked = (calls) =>
  calls.map(({ id, name, text }) => ({ id, type: "function", function: { name, arguments: text } }));

/** One line a call, for copying and for those who hear it. */
export const sentence = (calls) => calls.map(({ name, text }) => `call of ${name} with ${text || "no arguments"}`).join("\n");

/** Show calls in a box. With `onResults` there is a field for the result of each; it is called with their texts. */
export function show(box, calls, label, onResults = null) {
  const fields = [];
  const parts = calls.map(({ name, text }, place) => {
    const part = make("div", "call");
    const title = make("p", "call-name", "Call of ");
    title.append(make("code", "", name));
    part.append(title, make("pre", "", indented(text)));
    if (onResults) {
      const field = make("textarea");
      field.rows = 2;
      const named = make("label", "", `Result of ${name}`);
      named.append(field);
      field.setAttribute("aria-label", `Result of call ${place + 1}, ${name}, of ${label}`);
      fields.push(field);
      part.append(named);
    }
    return part;
  });
  if (onResults) {
    const give = make("button", "", calls.length > 1 ? "Send the results" : "Send the result");
    give.type = "button";
    give.addEventListener("click", () => onResults(fields.map((field) => field.value)));
    parts.push(give);
  }
  box.replaceChildren(...parts);
}

/** Arguments over several lines, where they are whole. */
function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
