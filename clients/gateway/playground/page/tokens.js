/** Takes the chunks of an answer apart into tokens, each with its text, probability, alternatives and experts. */

const decoder = () => new TextDecoder("utf-8", { fatal: false });

/** The new text and the tokens of one chunk of either endpoint. A token: text, logprob, alternatives, and its routing: for
 * each layer the experts and their weights in pairs. What the chunk does not have is null. The text is that of the answer,
 * or of the reasoning before it (`isReasoning`); `calls` are what the chunk adds to calls of tools. */
export function parts(choice) {
  const delta = choice.delta ?? {};
  const reasoning = delta.reasoning_content ?? "";
  const text = reasoning || (delta.content ?? choice.text ?? "");
  const weights = choice.moeship?.expert_weights;
  const experts = (choice.moeship?.routed_experts ?? []).map((layers, token) =>
    layers.map((chosen, layer) => chosen.map((expert, place) => [expert, weights[token][layer][place]])),
  );
  const logprobs = choice.logprobs ?? {};
  let tokens = [];
  if (Array.isArray(logprobs.content)) {
    tokens = logprobs.content.map((one) => ({
      bytes: one.bytes ?? null,
      text: one.token,
      logprob: one.logprob,
      alternatives: (one.top_logprobs ?? []).map((other) => ({ text: other.token, logprob: other.logprob })),
    }));
  } else if (Array.isArray(logprobs.tokens)) {
    tokens = logprobs.tokens.map((one, index) => ({
      bytes: bytesOf(one),
      text: one,
      logprob: logprobs.token_logprobs?.[index] ?? null,
      alternatives: Object.entries(logprobs.top_logprobs?.[index] ?? {})
        .map(([other, logprob]) => ({ text: other, logprob }))
        .sort((a, b) => b.logprob - a.logprob),
    }));
  }
  const count = Math.max(tokens.length, experts.length);
  return {
    text,
    isReasoning: reasoning !== "",
    calls: delta.tool_calls ?? [],
    isLast: Boolean(choice.finish_reason),
    numExperts: choice.moeship?.num_experts ?? null,
    tokens: Array.from({ length: count }, (_, index) => ({
      bytes: null, text: null, logprob: null, alternatives: [], ...tokens[index], routing: experts[index] ?? null,
    })),
  };
}

/** The bytes of a token that is no whole character, which completions name "bytes:\\xe2\\x82"; null for others. */
function bytesOf(name) {
  if (!/^bytes:(\\x[0-9a-f]{2})+$/.test(name)) return null;
  return name.slice("bytes:".length).split("\\x").slice(1).map((digits) => parseInt(digits, 16));
}

/** Shares the text of a chunk among its tokens: runs of text, each with the tokens that spell it. A character that
 * several tokens spell is one run, and so is text that does not follow from the tokens, such as what a stop word cut. Tokens
 * without text, such as an end token, are a run of their own. */
export function runs({ text, tokens }) {
  if (!tokens.length) return text ? [{ text, tokens: [] }] : [];
  const found = [];
  let place = 0;
  let open = [];
  const utf8 = decoder();
  for (const token of tokens) {
    open.push(token);
    let spelt = token.bytes ? utf8.decode(new Uint8Array(token.bytes), { stream: true }) : token.text;
    // Some tokenizers drop the space before the first word of a text.
    if (place === 0 && spelt?.[0] === " " && !text.startsWith(" ")) spelt = spelt.slice(1);
    if (spelt && text.startsWith(spelt, place)) {
      found.push({ text: spelt, tokens: open });
      place += spelt.length;
      open = [];
    }
  }
  const rest = text.slice(place);
  if (rest || open.length) found.push({ text: rest, tokens: open });
  return found;
}

/** A token as it is shown where spaces and line ends must be seen. */
export function visible(text) {
  if (text === null || text === undefined) return "token";
  const spaces = text.trim() === "" ? / /g : /^ | $/g;
  return text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(spaces, "␣") || "no text";
}

export function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  if (value >= 99.95) return value > 99.995 ? "100 %" : `${value.toFixed(2)} %`;
  return value >= 0.1 ? `${value.toFixed(1)} %` : value >= 0.001 ? `${value.toFixed(3)} %` : "below 0.001 %";
}
