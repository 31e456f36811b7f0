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

/** Whether a line is a command, with as many words as it takes; all else is a message. */
export const isCommand = (line) => /^\/(clear|help|(temperature|topk)( +\S+)?)$/.test(line);

/** Whether a line is a single word like a command, but none: a slip, and no message. */
export const isNoCommand = (line) => /^\/[a-z]+$/i.test(line) && !isCommand(line);

/** Carry a command out. Returns what to tell the reader: a text, and rows to look things up in. */
export function runCommand(line, { settings, newChat }) {
  const [name, value] = line.split(/ +/);
  if (name === "/clear") {
    newChat();
    return { text: "A new chat. The one before is in the list." };
  }
  if (name === "/help") return { text: "Commands and keys", rows: [...COMMANDS, ...KEYS] };
  const [setting, label] = NUMBERS[name];
  if (value === undefined) return { text: `${label} is ${settings.values[setting] ?? "what the server takes"}.` };
  try {
    settings.set(setting, Number(value));
    return { text: `${label} is now ${settings.values[setting]}.` };
  } catch (error) {
    return { text: `${error.message}; got ${value}.` };
  }
}

/** What to tell the reader of a word that is no command. */
export const explainNoCommand = (word) => ({ text: `There is no command ${word}.`, rows: COMMANDS });
