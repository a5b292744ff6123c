// The server's own API, with the key that the user gave; errors carry the server's one sentence.

const ROOT = new URL("../v1/", location.href);
const STORED = "vllm-wsi-key";

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(STORED) ?? "",
  set: (value) => (value ? sessionStorage.setItem(STORED, value) : sessionStorage.removeItem(STORED)),
};

export function headers() {
  return key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
}

export function address(path, query = {}) {
  const url = new URL(path, ROOT);
  for (const [name, value] of Object.entries(query)) url.searchParams.set(name, value);
  return url.href;
}

async function sentence(answer) {
  if (answer.status === 401) return "This server asks for its API key, and for the right one.";
  try {
    const body = await answer.json();
    return body.error?.message ?? body.detail ?? `The server answered ${answer.status}.`;
  } catch {
    return `The server answered ${answer.status}.`;
  }
}

export async function ask(url, options = {}) {
  let answer;
  try {
    answer = await fetch(url, { ...options, headers: { ...headers(), ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.", 0);
  }
  if (!answer.ok) throw new ApiError(await sentence(answer), answer.status);
  return answer;
}

export async function json(path, query, signal) {
  return (await ask(address(path, query), { signal })).json();
}

export function post(path, body, signal) {
  const options = { method: "POST", body: JSON.stringify(body), signal, headers: { "Content-Type": "application/json" } };
  return ask(path, options);
}

// The text pieces of a streamed chat answer.
export async function* streamed(messages, model, signal) {
  const answer = await post(address("chat/completions"), { model, messages, stream: true, temperature: 0 }, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const part = JSON.parse(data);
      if (part.error) throw new ApiError(part.error.message ?? "The answer broke off.", part.error.code);
      const text = part.choices?.[0]?.delta?.content;
      if (text) yield text;
    }
  }
}
