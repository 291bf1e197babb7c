/** The messages of a conversation on the page. */

import { copyButton, make } from "./dom.js";
import { show } from "./markdown.js";

/**
 * @typedef {import("./store.js").Message} Message
 * @typedef {{edit: (message: Message, text: string) => void, regenerate: (message: Message) => void}} Actions
 */

const NAMES = { user: "You", assistant: "Assistant" };
/** Notes for the reasons of an answer's end; other reasons need none. */
const ENDS = /** @type {Record<string, string>} */ ({
  length: "The answer reached the limit of tokens or of the context.",
  stopped: "Stopped.",
  interrupted: "The page was closed before the answer was complete.",
});

/** A message on the page. */
export class MessageView {
  /**
   * @param {Message} message
   * @param {Actions} actions
   */
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.isSettled = false;
    this.body = make("div", { class: "body", dir: "auto" });
    this.thoughts = make("div", { class: "thoughts", dir: "auto" });
    this.thinking = make("summary", {}, "Reasoning");
    this.reasoning = make("details", { hidden: true }, this.thinking, this.thoughts);
    this.note = make("p", { class: "note", hidden: true });
    this.figures = make("span", { class: "figures" });
    this.copy = copyButton(() => message.content, "Copy the message");
    this.edit = make("button", { type: "button", class: "quiet small", click: () => this.openEditor() }, "Edit");
    this.again = make("button", { type: "button", class: "quiet small", click: () => actions.regenerate(message) });
    this.foot = make("footer", {}, this.figures, this.copy, this.edit, this.again);
    const name = NAMES[message.role];
    this.node = make("article", { class: message.role, "aria-label": name },
      make("h2", { class: "unseen" }, name), this.reasoning, this.body, this.note, this.foot);
  }

  /**
   * Show the message's present state.
   * @param {{isRunning: boolean, isBusy: boolean, isLast: boolean}} state
   *     isRunning: this answer arrives; isBusy: an answer of the conversation arrives
   */
  update({ isRunning, isBusy, isLast }) {
    const { role, content, reasoning = "", error, finish = "" } = this.message;
    if (role === "user") this.body.textContent = content;
    else show(this.body, content);
    this.reasoning.hidden = reasoning === "";
    if (this.thoughts.textContent !== reasoning) this.thoughts.textContent = reasoning;
    this.thinking.textContent = isRunning && !content ? "Reasoning…" : "Reasoning";
    const note = error ?? (isRunning ? "" : ENDS[finish] ?? "");
    this.note.textContent = note;
    this.note.hidden = note === "";
    this.note.classList.toggle("error", error !== undefined);
    this.node.classList.toggle("running", isRunning);
    this.node.setAttribute("aria-busy", String(isRunning));
    this.figures.textContent = figuresText(this.message);
    this.copy.hidden = isRunning || content === "";
    this.edit.hidden = isBusy || (role === "assistant" && content === "");
    this.again.hidden = isBusy || !isLast;
    this.again.textContent = role === "user" || error ? "Try again" : "Regenerate";
  }

  /** Let the user change the text in place. */
  openEditor() {
    const { message } = this;
    const area = /** @type {HTMLTextAreaElement} */ (make("textarea", { "aria-label": "Edit the message" }));
    area.value = message.content;
    area.rows = Math.min(message.content.split("\n").length + 1, 16);
    const close = () => {
      editor.replaceWith(this.body);
      this.foot.hidden = false;
      this.edit.focus();
    };
    const save = () => {
      if (!area.value.trim()) return;
      close();
      this.actions.edit(message, area.value);
    };
    const keys = (/** @type {KeyboardEvent} */ event) => {
      const isSave = event.key === "Enter" && !event.isComposing && !event.shiftKey;
      if (event.key !== "Escape" && !(isSave && message.role === "user")) return;
      event.preventDefault();
      event.stopPropagation();
      if (isSave) save();
      else close();
    };
    area.addEventListener("keydown", keys);
    const editor = make("div", { class: "editor" }, area, make("div", { class: "row end" },
      make("button", { type: "button", class: "quiet", click: close }, "Cancel"),
      make("button", { type: "button", click: save }, message.role === "user" ? "Send again" : "Save")));
    if (message.role === "user") editor.append(make("p", { class: "hint" }, "Sending again removes the messages below."));
    this.body.replaceWith(editor);
    this.foot.hidden = true;
    area.focus();
  }
}

/** @param {Message} message */
function figuresText({ figures = {} }) {
  const { firstMs, perSecond, tokens, prompt, cached, queueMs = 0 } = figures;
  const parts = [];
  if (firstMs !== undefined) parts.push(`first token ${seconds(firstMs)}`);
  if (queueMs >= 50) parts.push(`${seconds(queueMs)} of it in the queue`);
  if (perSecond) parts.push(`${perSecond.toFixed(perSecond < 10 ? 1 : 0)} tokens/s`);
  if (tokens !== undefined) parts.push(`${tokens} tokens`);
  if (prompt !== undefined) parts.push(`prompt ${prompt}, ${cached ?? 0} cached`);
  return parts.join(" · ");
}

/** @param {number} ms */
const seconds = (ms) => (ms < 10_000 ? `${(ms / 1000).toFixed(2)} s` : `${Math.round(ms / 1000)} s`);
