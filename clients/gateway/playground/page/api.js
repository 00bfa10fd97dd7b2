/** Talks to the gateway: its models, and answers as they are written. Nothing here touches the page. */

/** An error whose message can be shown to whoever reads the page. */
export class ShownError extends Error {
  constructor(message, { param = null, code = null, status = 0 } = {}) {
    super(message);
    this.param = param;
    this.code = code;
    this.status = status;
  }
}

const PLAIN = {
  401: "The gateway asks for an API key, or does not know this one. Enter a key in the settings.",
  403: "The gateway does not let this API key do that.",
  404: "The gateway does not serve this model. Choose another one.",
  413: "The message is too long for the gateway. Shorten it, or clear the conversation.",
  429: "The server has as many requests as it can take. Send this again in a moment.",
  500: "The server failed. Its log has the reason.",
  502: "The gateway cannot reach the server.",
  503: "The server is not ready. Send this again in a moment.",
  504: "The server took too long to answer.",
};

const PLAIN_CODES = {
  no_chat_template: "This model cannot chat, since it has no chat template. Choose Completion at the top of the page.",
};

const PLAIN_ENDS = {
  unavailable: "The answer broke off, since the server ended. Send this again in a moment.",
  cancelled: "The answer broke off, since the server ended it. Send this again in a moment.",
  rate_limit_exceeded: "The answer broke off, since the server has too much to do. Send this again in a moment.",
  deadline_exceeded: "The answer took longer than the gateway allows. Ask for fewer tokens.",
};

function headers(key) {
  // fetch() would refuse such a header with the same error as where nothing answers.
  if (/[^\x21-\x7e]/.test(key)) throw new ShownError("An API key has no spaces and no letters beyond ASCII. Enter it again.");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function ask(path, options) {
  try {
    return await fetch(path, { ...options, cache: "no-store", credentials: "omit", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ShownError("The gateway cannot be reached. Look whether it runs, and send this again.");
  }
}

/** The error of a response that is no success, in plain words and then in the server's own. */
async function failure(response) {
  let told = {};
  try {
    told = (await response.json()).error ?? {};
  } catch {
    // What is no JSON has nothing to say beside the status.
  }
  return shown(told, response.status, response.headers.get("Retry-After"));
}

function shown(told, status, retryAfter = null) {
  const own = typeof told.message === "string" ? told.message : "";
  const plain = PLAIN_CODES[told.code] ?? PLAIN[status] ?? "";
  const wait = status === 429 && /^\d+$/.test(retryAfter ?? "") ? ` The server says after ${retryAfter} s.` : "";
  const text = [plain + wait, own].filter(Boolean).join("\n");
  return new ShownError(text || `The gateway answered with status ${status}.`, {
    param: told.param ?? null, code: told.code ?? null, status,
  });
}

/** The error of an answer that had begun, which has a code and no status. */
function broken(told) {
  const plain = PLAIN_ENDS[told.code] ?? "The answer broke off, since the server failed.";
  const own = typeof told.message === "string" ? told.message : "";
  return new ShownError([plain, own].filter(Boolean).join("\n"), { param: told.param ?? null, code: told.code ?? null });
}

/** A request as JSON, whose seed may be a BigInt. */
function encoded({ seed, ...others }) {
  const text = JSON.stringify(others);
  return seed === undefined ? text : `${text.slice(0, -1)},"seed":${seed}}`;
}

/** The models, in the gateway's order. */
export async function models(key) {
  const response = await ask("v1/models", { headers: headers(key) });
  if (!response.ok) throw await failure(response);
  const { data } = await response.json();
  return data;
}

/** The chunks of a streamed answer. `path` is that of the endpoint. Throws ShownError, and AbortError after `signal`. */
export async function* chunks(path, body, key, signal) {
  const response = await ask(path, { method: "POST", headers: headers(key), body: encoded(body), signal });
  if (!response.ok) throw await failure(response);
  let done = false;
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") {
      done = true;
      break;
    }
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      throw new ShownError("The gateway sent something that is no JSON. The answer is not whole.");
    }
    if (chunk.error) throw broken(chunk.error);
    yield chunk;
  }
  if (!done) throw new ShownError("The connection ended before the answer did.");
}

/** The data of server-sent events, as the HTML standard reads them: lines end in CR, LF or both, an empty line ends an
 * event, and several data lines of one event are joined. */
async function* events(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      let read;
      try {
        read = await reader.read();
      } catch (error) {
        if (signal.aborted) throw new DOMException("stopped", "AbortError");
        throw new ShownError("The connection broke before the answer ended.");
      }
      if (read.done) return;
      rest += read.value;
      for (;;) {
        const end = rest.search(/[\r\n]/);
        // A CR at the end may be the first half of CR LF.
        if (end < 0 || (rest[end] === "\r" && end === rest.length - 1)) break;
        const line = rest.slice(0, end);
        rest = rest.slice(end + (rest.startsWith("\r\n", end) ? 2 : 1));
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
