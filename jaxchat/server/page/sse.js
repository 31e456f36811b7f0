/**
 * Server-sent events from a stream of bytes, however the network cuts it.
 *
 * Bytes become characters only when the last byte of a character is there, characters become lines
 * only at a line end, lines become an event only at an empty line. See
 * https://html.spec.whatwg.org/multipage/server-sent-events.html; of the fields, only `data` is used.
 */

/** Yield the data of each event. An event that the stream breaks off is dropped. */
export async function* readEvents(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      // a CR at the end may be the first half of a CR LF: it waits for what follows, if anything
      const lines = rest.split(done ? /\r\n|\n|\r/ : /\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
      if (done) return;
    }
  } finally {
    // leaving the loop early closes the connection, which is how the server learns to stop
    await reader.cancel().catch(() => {});
  }
}
