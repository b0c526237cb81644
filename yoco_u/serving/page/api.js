// Requests to the server: JSON by get(), streamed answers by stream().

import { recall, remember } from "./memory.js";

let key = recall("sessionStorage", "key") ?? "";

export function setKey(value) {
  key = value.trim();
  remember("sessionStorage", "key", key);
}

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

function headers() {
  if (/[^\x21-\x7e]/.test(key)) throw new ApiError("the API key has characters that no key has", 401);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function fail(response) {
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // the body is no error of the API, so the status alone must do
  }
  const wait = response.headers.get("Retry-After");
  throw new ApiError(response.status === 429 && wait ? `${message} (in ${wait} s)` : message, response.status);
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("the server cannot be reached", 0);
  }
}

export async function get(path) {
  const response = await reach(path, { headers: headers() });
  if (!response.ok) await fail(response);
  return response.json();
}

// Yields the chunks of a streamed answer; throws ApiError when the server reports an error or the stream breaks off.
export async function* stream(path, body, signal) {
  const response = await reach(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers() },
    body: JSON.stringify({
      ...body,
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    }),
    signal,
  });
  if (!response.ok) await fail(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("the connection broke", 0);
    }
    if (read.done) throw new ApiError("the answer was cut off", 0);
    rest += read.value;
    const events = rest.split("\n\n");
    rest = events.pop(); // an event that has not come in full
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, 500);
      yield chunk;
    }
  }
}
