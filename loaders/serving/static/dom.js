/** Helpers that build and read the page's elements. Text always becomes a text node. */

/**
 * Return the element with an id.
 * @param {string} id
 * @returns {any}
 */
export const byId = (id) => document.getElementById(id);

/**
 * Return a new element.
 * @param {string} tag
 * @param {Record<string, any>} attributes  functions become event listeners: `click`, `input`
 * @param {...(Node | string | (Node | string)[])} children
 * @returns {HTMLElement}
 */
export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== undefined) node.setAttribute(name, value);
  }
  // One at a time: a call takes only so many arguments.
  for (const child of children.flat()) node.append(child);
  return node;
}

/**
 * Return a button that copies a text.
 * @param {() => string} read  returns the text
 * @param {string} label  the button's accessible name
 */
export function copyButton(read, label) {
  const button = make("button", { type: "button", class: "quiet small", "aria-label": label, click: press }, "Copy");
  async function press() {
    const isCopied = await copy(read());
    button.textContent = isCopied ? "Copied" : "Copying failed";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }
  return button;
}

/** @param {string} text */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text);
  }
}

/** Copy where the browser has no clipboard API: over plain HTTP from another machine. */
function copyBySelection(text) {
  const area = /** @type {HTMLTextAreaElement} */ (make("textarea", { class: "unseen", readonly: true }));
  const focused = /** @type {HTMLElement | null} */ (document.activeElement);
  area.value = text;
  document.body.append(area);
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return isCopied;
}

/**
 * Save a value as a file of JSON.
 * @param {string} name
 * @param {unknown} value
 */
export function download(name, value) {
  const url = URL.createObjectURL(new Blob([JSON.stringify(value, null, 2)], { type: "application/json" }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

/**
 * Ask for a text or for consent.
 * @param {{title: string, text?: string, agree: string, value?: string, type?: string, pattern?: string, isDanger?: boolean}} question
 *     without `value`, the dialog has no field
 * @returns {Promise<string | null>} the text; null if the user cancels
 */
export function ask({ title, text = "", agree, value, type = "text", pattern, isDanger = false }) {
  const dialog = byId("question"), field = byId("answer"), button = byId("agree");
  byId("question-title").textContent = title;
  byId("question-text").textContent = text;
  field.hidden = field.disabled = value === undefined;
  field.type = type;
  field.value = value ?? "";
  field.pattern = pattern ?? ".*";
  button.textContent = agree;
  button.classList.toggle("danger", isDanger);
  dialog.returnValue = "cancel";
  dialog.showModal();
  (field.hidden ? button : field).focus();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "save" ? field.value : null), { once: true });
  });
}
