/**
 * The server's API: what is sent, what comes back, and every way in which it can fail. All paths of
 * this page are relative to its address: a proxy may serve it below a path of its own.
 */

import { readEvents } from "./sse.js";

/** Alternatives asked for beside each token. */
const TOP_LOGPROBS = 5;

/** Of a base model, which never ends by itself; the completions API would take 16. */
const BASE_MAX_TOKENS = 128;

/** A failed request. `kind` decides what the page offers: see `ADVICE`. */
export class ApiError extends Error {
  constructor(kind, message, { retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { kind, retryAfter });
  }
}

/** What each kind of failure means to the reader. */
export const ADVICE = {
  auth: "The server wants an API key, or another one. Settings has a field for it.",
  broken: "The connection broke before the answer was complete.",
  busy: "The server has too much to do.",
  context: "The conversation is too long for this model.",
  gone: "The server does not have this model any more.",
  message: "The message itself is too long for this model.",
  offline: "The server cannot be reached. Is it still running?",
  request: "The server refused the request.",
  server: "The server failed.",
  settings: "The message is too long for this model together with the system prompt and the longest answer of the settings.",
  starting: "The model is being loaded and compiled. The answer comes as soon as that is done.",
};

/**
 * The models that can answer, in the order of training: base, mid, sft, rl, then others. `defaults`:
 * the settings that the server takes where a request has none.
 */
export async function listModels(apiKey) {
  const response = await send("v1/models", { headers: headers(apiKey) });
  const { data } = await response.json();
  return data.map((model) => ({ id: model.id, stage: stageOf(model.id), defaults: defaultsOf(model) })).sort(byStage);
}

function defaultsOf({ default_sampling_params: told }) {
  const defaults = { temperature: told?.temperature, topK: told?.top_k };
  return Object.fromEntries(Object.entries(defaults).filter(([, value]) => Number.isFinite(value)));
}

const STAGES = ["base", "mid", "sft", "rl"];

/** The stage of training that a model's id names, or "". */
export function stageOf(id) {
  const words = id.toLowerCase().split(/[^a-z]+/);
  return STAGES.find((stage) => words.includes(stage)) ?? "";
}

/** Of some models, the one that training has brought furthest. */
export function furthest(ids) {
  const rank = (id) => STAGES.indexOf(stageOf(id));
  return ids.reduce((best, id) => (rank(id) > rank(best) ? id : best));
}

/** This model, or where the server has it no more another one of its stage; undefined for none. */
export function standIn(id, available) {
  if (available.includes(id)) return id;
  const stage = stageOf(id);
  return available.find((other) => stage && stageOf(other) === stage);
}

/** A base model has never seen a turn of a conversation: it continues the last message. */
export const continuesText = (model) => stageOf(model) === "base";

function byStage(a, b) {
  const rank = ({ stage }) => (stage ? STAGES.indexOf(stage) : STAGES.length);
  return rank(a) - rank(b) || a.id.localeCompare(b.id);
}

/**
 * Stream one answer. Yields `{ part, text, tokens }` as it grows (part: "text", "python" or
 * "python_output"; tokens: `[text, logprob, [[text, logprob], ...]]` each), then
 * `{ finish, usage }`. Throws ApiError; an abort of `signal` throws AbortError.
 */
export async function* streamAnswer({ model, messages, settings, signal }) {
  const response = await send(pathFor(model), {
    method: "POST",
    // jupyter-server-proxy holds back whole what does not say so
    headers: { ...headers(settings.apiKey), "Content-Type": "application/json", Accept: "text/event-stream" },
    body: JSON.stringify(requestBody(model, messages, settings)),
    signal,
  });
  let [finish, usage] = [null, null];
  try {
    for await (const data of readEvents(response.body)) {
      if (data === "[DONE]") {
        yield { finish: finish ?? "stop", usage };
        return;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError("server", chunk.error.message);
      usage = chunk.usage ?? usage;
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      finish = choice.finish_reason ?? finish;
      const { type: part, text } = pieceOf(choice);
      const tokens = tokensOf(choice.logprobs);
      if (text || tokens.length) yield { part, text, tokens };
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError("broken", error.message);
  }
  throw new ApiError("broken", "The stream ended without its end mark.");
}

const pathFor = (model) => (continuesText(model) ? "v1/completions" : "v1/chat/completions");

function requestBody(model, messages, settings) {
  const body = {
    model,
    // JSON leaves out what is undefined: the server takes its own
    temperature: settings.temperature ?? undefined,
    top_k: settings.topK ?? undefined,
    top_p: settings.topP,
    stream: true,
    stream_options: { include_usage: true },
  };
  if (settings.maxTokens !== null) body.max_tokens = settings.maxTokens;
  body.seed = settings.seed ?? Math.floor(Math.random() * 2 ** 31);
  if (continuesText(model)) {
    if (settings.tokenView) body.logprobs = TOP_LOGPROBS;
    body.max_tokens ??= BASE_MAX_TOKENS;
    return { ...body, prompt: plainText(messages.at(-1).content) };
  }
  if (settings.tokenView) Object.assign(body, { logprobs: true, top_logprobs: TOP_LOGPROBS });
  return { ...body, messages };
}

function plainText(content) {
  return typeof content === "string" ? content : content.map((part) => part.text).join("");
}

/** Text as OpenAI's API has it; calls of the tool come as `part`, which other clients ignore. */
function pieceOf({ delta, text }) {
  return delta?.part ?? { type: "text", text: delta?.content ?? text ?? "" };
}

/** The chat API lists tokens as objects, the older completions API as parallel arrays. */
function tokensOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((token) => [
      token.token,
      token.logprob,
      (token.top_logprobs ?? []).map((other) => [other.token, other.logprob]),
    ]);
  }
  return (logprobs.tokens ?? []).map((token, index) => [
    token,
    logprobs.token_logprobs[index],
    Object.entries(logprobs.top_logprobs?.[index] ?? {}).sort((a, b) => b[1] - a[1]),
  ]);
}

/** A response with status 200; everything else is an ApiError. */
async function send(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("offline", `Nothing answers at ${location.host}${location.pathname}.`);
  }
  if (response.ok) return response;
  const { message, code } = await errorOf(response);
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  throw new ApiError(kindOf(response.status, code), message, { retryAfter });
}

async function errorOf(response) {
  try {
    const { error } = await response.json();
    return { message: String(error.message), code: error.code };
  } catch {
    return { message: `HTTP ${response.status} ${response.statusText}`.trim(), code: null };
  }
}

function kindOf(status, code) {
  if (code === "context_length_exceeded") return "context";
  if (code === "model_not_found") return "gone";
  if (code === "starting") return "starting";
  if (status === 401 || status === 403) return "auth";
  if (status === 429 || status === 503) return "busy";
  return status >= 500 ? "server" : "request";
}

/** ApiError for a key that cannot be sent, such as one pasted with an invisible character. */
function headers(apiKey) {
  if (!apiKey) return {};
  const named = { Authorization: `Bearer ${apiKey}` };
  try {
    new Headers(named); // fetch would throw what it throws where nobody answers
  } catch {
    throw new ApiError("auth", "The API key has a character that cannot be sent: type it anew.");
  }
  return named;
}
