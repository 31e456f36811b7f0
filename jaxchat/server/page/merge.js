/**
 * What two tabs have made of one conversation, as one. Messages are only ever added or removed, and
 * grow only in the tab that streams them; so their union is right, without those that either tab has
 * removed, and of a message in both the longer one is the newer one, or the one that has ended.
 */

/**
 * Take over into `ours` what only `theirs` has, and drop what it has removed. `isGrowing(id)` tells
 * which messages are streamed here. Returns whether `ours` has changed.
 */
export function merge(ours, theirs, isGrowing) {
  const before = JSON.stringify([ours.title, ours.messages, ours.children]);
  const shown = shownChildren(ours);
  if ((theirs.renamed ?? 0) > (ours.renamed ?? 0)) Object.assign(ours, { title: theirs.title, renamed: theirs.renamed });
  for (const [id, message] of Object.entries(theirs.messages)) {
    const mine = ours.messages[id];
    if (!mine) ours.messages[id] = structuredClone(message);
    else if (!isGrowing(id) && isNewer(message, mine)) takeContent(mine, message);
    ours.messages[id].restored = later(mine?.restored, message.restored);
  }
  ours.removed = Object.fromEntries(
    Object.keys({ ...ours.removed, ...theirs.removed }).map((id) => [id, later(ours.removed?.[id], theirs.removed?.[id])]),
  );
  joinChildren(ours, ours, theirs);
  for (const message of Object.values(ours.messages)) joinChildren(ours, message, theirs.messages[message.id]);
  dropWhatHangsOnNothing(ours);
  showAgain(ours, shown);
  ours.updated = Math.max(ours.updated, theirs.updated);
  return JSON.stringify([ours.title, ours.messages, ours.children]) !== before;
}

const later = (a, b) => (a === undefined && b === undefined ? undefined : Math.max(a ?? 0, b ?? 0));

function isNewer(message, mine) {
  const more = length(message) - length(mine);
  // a stream that this tab knows nothing of, or took for stopped, has ended in the other
  const hasEnded = ["streaming", "stopped"].includes(mine.status) && message.status !== "streaming";
  return more > 0 || (more === 0 && hasEnded);
}

const length = (message) => message.parts.reduce((sum, { text }) => sum + text.length, 0);

/** All of a message but its place in the tree. */
function takeContent(mine, message) {
  const { parent, children, active } = mine;
  for (const name of Object.keys(mine)) delete mine[name];
  Object.assign(mine, structuredClone(message), { parent, children, active });
}

/** Whether a message has been removed after it was last brought back. */
function isGone({ removed, messages }, id) {
  return (removed[id] ?? 0) > (messages[id]?.restored ?? 0);
}

function joinChildren(conversation, mine, theirs) {
  const all = new Set([...mine.children, ...(theirs?.children ?? [])]);
  mine.children = [...all].filter((id) => conversation.messages[id] && !isGone(conversation, id));
}

function dropWhatHangsOnNothing(conversation) {
  const reached = new Set();
  const queue = [...conversation.children];
  while (queue.length) {
    const id = queue.pop();
    reached.add(id);
    queue.push(...conversation.messages[id].children);
  }
  for (const id of Object.keys(conversation.messages)) if (!reached.has(id)) delete conversation.messages[id];
}

/** The shown child of each message, and of the conversation (""). */
function shownChildren(conversation) {
  const holders = [["", conversation], ...Object.entries(conversation.messages)];
  return new Map(holders.map(([id, { children, active }]) => [id, children[active]]));
}

function showAgain(conversation, shown) {
  for (const [id, holder] of [["", conversation], ...Object.entries(conversation.messages)]) {
    const index = holder.children.indexOf(shown.get(id));
    if (index >= 0) holder.active = index;
    else holder.active = Math.max(0, Math.min(holder.active, holder.children.length - 1));
  }
}
