/** Commands that begin with a slash, those of the terminal's chat, and the page's keys. */

export const KEYS = [
  ["Enter", "send"],
  ["Shift+Enter", "new line"],
  ["Esc", "stop the answer"],
  ["Up, in an empty box", "edit your last message"],
  ["Ctrl+Shift+O", "new chat"],
  ["Ctrl+K", "search conversations"],
];

const COMMANDS = [
  ["/temperature 0.6", "how freely to choose: 0 always takes the most likely token"],
  ["/topk 50", "how many tokens to choose from: 0 for all"],
  ["/clear", "a new chat"],
  ["/help", "this list"],
];

const NUMBERS = { "/temperature": ["temperature", "Temperature"], "/topk": ["topK", "Top-k"] };

/** Whether a line is a command and not a message: a known name, or a single word like one. */
export const isCommand = (line) => /^\/[a-z]+(\s|$)/.test(line) && !line.includes("\n");

/** Carry a command out. Returns what to tell the reader: a text, and rows to look things up in. */
export function runCommand(line, { settings, newChat }) {
  const [name, value] = line.trim().split(/\s+/, 2);
  if (name === "/clear") {
    newChat();
    return { text: "A new chat. The one before is in the list." };
  }
  const rows = [...COMMANDS, ...KEYS];
  if (name === "/help") return { text: "Commands and keys", rows };
  if (!(name in NUMBERS)) return { text: `There is no ${name}.`, rows };
  const [setting, label] = NUMBERS[name];
  if (value === undefined) return { text: `${label} is ${settings.values[setting]}.` };
  try {
    settings.set(setting, Number(value));
    return { text: `${label} is now ${settings.values[setting]}.` };
  } catch (error) {
    return { text: `${error.message}; got ${value}.` };
  }
}
