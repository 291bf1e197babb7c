/** The server's API: models, streamed chats, and metrics. */

/**
 * @typedef {{id: string, loaded?: boolean, max_model_len?: number}} Model
 * @typedef {{running: number, waiting: number}} Load
 */

const KEY = "precast.key";

/** An error that the server reports, or a connection that fails. */
export class ApiError extends Error {
  /**
   * @param {string} message  one sentence
   * @param {number} status  the HTTP status; 0 without an answer
   */
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Return the API key; it lasts until the tab closes. */
export function readKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

/** @param {string} key */
export function saveKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/** @returns {Promise<Model[]>} */
export async function models() {
  return (await (await request("v1/models")).json()).data;
}

/**
 * Yield the chunks of a streamed chat.
 * @param {object} body
 * @param {AbortSignal} signal
 */
export async function* chat(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, 200);
    yield chunk;
  }
  throw new ApiError("The connection ended before the answer was complete.");
}

/**
 * Return the load of a model.
 * @param {string} model
 * @returns {Promise<Load>}
 */
export async function load(model) {
  const lines = (await (await request("metrics")).text()).split("\n");
  /** @param {string} name */
  const read = (name) => {
    const line = lines.find((one) => one.startsWith(`precast:${name}{model_name=${JSON.stringify(model)}}`));
    return line ? Number(line.slice(line.lastIndexOf(" "))) : 0;
  };
  return { running: read("num_requests_running"), waiting: read("num_requests_waiting") };
}

/**
 * @param {string} path  relative to the page, so that a proxy may add a prefix
 * @param {RequestInit} options
 */
async function request(path, options = {}) {
  const key = readKey();
  const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
  const response = await connected(() => fetch(path, { ...options, headers }));
  if (response.ok) return response;
  const text = await response.text();
  throw new ApiError(messageOf(text) ?? `The server answered with status ${response.status}.`, response.status);
}

/** @param {string} text */
function messageOf(text) {
  try {
    return JSON.parse(text).error.message;
  } catch {
    return undefined;
  }
}

/**
 * Do a step of a request; name the cause if the connection fails.
 * @template T
 * @param {() => Promise<T>} step
 */
async function connected(step) {
  try {
    return await step();
  } catch (error) {
    if (/** @type {Error} */ (error).name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached; check that it runs.");
  }
}

/**
 * Yield the data of server-sent events.
 * @param {Response} response
 */
export async function* events(response) {
  if (!response.body) return;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", data = [];
  try {
    for (;;) {
      const { done, value } = await connected(() => reader.read());
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop() ?? "";
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
