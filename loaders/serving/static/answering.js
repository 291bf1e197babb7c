/** One answer: the request for it, and the message that grows with its chunks. */

import { chat } from "./api.js";

/**
 * @typedef {import("./store.js").Conversation} Conversation
 * @typedef {import("./store.js").Message} Message
 */

/**
 * Return the request for the next answer of a conversation.
 * @param {Conversation} conversation
 */
export function requestOf({ model, system, sampling, messages }) {
  const sent = messages.filter(({ role, content }) => role === "user" || content !== "");
  const turns = sent.map(({ role, content }) => ({ role, content }));
  if (system.trim()) turns.unshift({ role: "system", content: system });
  return { model, messages: turns, ...sampling };
}

/**
 * Let a message grow until the answer is complete. The message records a failure or a stop.
 * @param {Message} message
 * @param {object} request
 * @param {AbortSignal} signal
 * @param {() => void} changed  called after each chunk
 * @returns {Promise<unknown>} the error; undefined without one
 */
export async function grow(message, request, signal, changed) {
  const began = performance.now();
  try {
    for await (const chunk of chat(request, signal)) {
      absorb(message, chunk, performance.now() - began);
      changed();
    }
  } catch (error) {
    if (signal.aborted) message.finish = "stopped";
    else {
      message.error = /** @type {Error} */ (error).message;
      return error;
    }
  }
  return undefined;
}

/**
 * Add a chunk to a message.
 * @param {Message} message
 * @param {any} chunk
 * @param {number} elapsedMs  since the request
 */
export function absorb(message, chunk, elapsedMs) {
  const figures = (message.figures ??= {});
  const { delta = {}, finish_reason: finish } = chunk.choices[0] ?? {};
  const { content = "", reasoning_content: reasoning = "" } = delta;
  if (content || reasoning) figures.firstMs ??= Math.round(elapsedMs);
  message.content += content;
  if (reasoning) message.reasoning = (message.reasoning ?? "") + reasoning;
  if (finish) message.finish = finish;
  if (chunk.usage) {
    figures.tokens = chunk.usage.completion_tokens;
    figures.prompt = chunk.usage.prompt_tokens;
    figures.cached = chunk.usage.prompt_tokens_details?.cached_tokens ?? 0;
  }
  if (chunk.timings) {
    figures.perSecond = chunk.timings.predicted_per_second;
    figures.queueMs = chunk.timings.queue_ms;
  }
}
