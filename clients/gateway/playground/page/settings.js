/** Reads the fields of the settings into the fields of a request. */

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
export const MOST_ALTERNATIVES = 5;

const field = (id) => document.getElementById(id);

/** The first field of a mode with a value that no server takes, and what is wrong with it; null if all are right. */
export function problem(mode) {
  for (const id of NUMBERS) {
    const input = field(id);
    if (!input.checkValidity()) {
      const name = input.labels[0].firstChild.textContent.trim();
      return { input, text: `${name}: ${input.validationMessage}` };
    }
  }
  if (field("max_tokens").value === "") return { input: field("max_tokens"), text: "Most tokens: enter a number" };
  try {
    if (mode === "chat") tools();
  } catch {
    const text = 'Enter a list, such as [{"type": "function", "function": {"name": "weather", "parameters": {}}}]';
    field("tools").setCustomValidity(text);
    return { input: field("tools"), text: `Tools: ${text}` };
  }
  return null;
}

/** The functions that a model may call, as OpenAI's API has them. Throws where the field is no list of objects. */
function tools() {
  const text = field("tools").value.trim();
  const found = text === "" ? [] : JSON.parse(text);
  if (!Array.isArray(found) || found.some((one) => typeof one !== "object" || one === null)) throw new Error("no list");
  return found;
}

/** The fields of a request for a mode. Empty ones are left to the server. */
export function fields(mode) {
  const found = { stream: true, stream_options: { include_usage: true } };
  for (const id of NUMBERS) {
    const { value } = field(id);
    if (value === "") continue;
    // A seed may have 64 bits, which a number of JavaScript does not hold.
    found[id] = id === "seed" && /^\d+$/.test(value) ? BigInt(value) : Number(value);
  }
  if (mode === "chat" && tools().length) found.tools = tools();
  const stops = field("stop_words").value.split("\n").filter((word) => word !== "");
  if (stops.length) found.stop = stops;
  if (field("logprobs").checked && !field("logprobs").disabled) {
    Object.assign(found, mode === "chat" ? { logprobs: true, top_logprobs: MOST_ALTERNATIVES } : { logprobs: MOST_ALTERNATIVES });
  }
  if (field("routing").checked && !field("routing").disabled) found.return_routed_experts = true;
  return found;
}

export const system = () => field("system").value.trim();
export const key = () => field("key").value.trim();
