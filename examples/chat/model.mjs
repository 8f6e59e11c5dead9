// A model, whichever runtime runs it: loads what was exported, makes the prompt, and answers token by token.

import { Template } from './packages/@huggingface/jinja/dist/index.js';

const PROMPT_CHUNK = 32; // tokens at once: bounds the memory of their logits, and Stop need not wait for a long prompt
const MOST = Number(new URLSearchParams(location.search).get('tokens')) || 512; // tokens an answer

/** report({name, total, received}) is called as bytes come. */
export async function openModel(report) {
  const { name, files } = await (await get('model.json')).json();
  const kind = files.some((file) => file.name.endsWith('.gguf')) ? 'gguf' : 'onnx';
  const { WEIGHTS, open } = await import(`./${kind}.mjs`);
  const weights = files.filter((file) => WEIGHTS.test(file.name));
  const total = weights.reduce((sum, file) => sum + file.bytes, 0);
  let received = 0;
  report({ name, total, received });
  const load = async () => {
    const contents = {};
    for (const file of weights)
      contents[file.name] = await download(file, (bytes) => report({ name, total, received: (received += bytes) }));
    return contents;
  };
  const text = async (wanted) => (files.some((file) => file.name === wanted) ? (await get(`model/${wanted}`)).text() : null);
  return new Model(name, total, await open(load, text));
}

class Model {
  /**
   * @param engine what onnx.mjs and gguf.mjs give:
   *   where        for the person: "llama.cpp, 4 threads"
   *   context      tokens that it can hold
   *   template     Jinja text of the chat template, or null
   *   variables    what the template may use: bos_token, …
   *   isEnd(id)    whether a token ends the answer
   *   encode(text, special), decode(ids)   special: with the tokens that the tokenizer adds by itself (BOS)
   *   keep(n)      keeps the first n tokens that it was fed, or fewer; how many it kept
   *   feed(ids)    the most likely next token
   */
  constructor(name, bytes, engine) {
    Object.assign(this, { name, bytes, engine, chats: Boolean(engine.template), fed: [] });
    this.template = this.chats ? new Template(engine.template) : null;
  }

  /** The whole chat through the template, which writes BOS itself; without a template, the last text as it is. */
  async encode(messages) {
    if (!this.chats) return this.engine.encode(messages.at(-1).content, true);
    return this.engine.encode(this.template.render({ ...this.engine.variables, messages, add_generation_prompt: true }), false);
  }

  /** {text so far, number of its tokens, note: why it ended, if by a limit}; without tokens while the prompt is read. */
  async *answer(messages) {
    const { engine } = this;
    const prompt = await this.encode(messages);
    if (!prompt.length) throw new Error('The model cannot continue an empty text.');
    if (prompt.length >= engine.context)
      throw new Error(`This chat has ${prompt.length} tokens, and the model holds ${engine.context}. Begin a new chat.`);
    let same = 0; // what the cache holds of an earlier turn; at least one token has to be fed
    while (same < prompt.length - 1 && prompt[same] === this.fed[same]) same++;
    same = await engine.keep(same);
    this.fed.length = same;
    let next;
    for (let at = same; at < prompt.length; at += PROMPT_CHUNK) {
      yield { text: '', tokens: 0 };
      next = await this.feed(prompt.slice(at, at + PROMPT_CHUNK));
    }
    // Decoded behind the prompt's last token: some tokenizers drop a space at the beginning of a text.
    const ids = prompt.slice(-1);
    const before = (await engine.decode(ids)).length;
    while (!engine.isEnd(next)) {
      ids.push(next);
      const text = (await engine.decode(ids)).slice(before).replace(/\uFFFD+$/, ''); // a character's bytes may be halved
      const tokens = ids.length - 1;
      const full = this.fed.length >= engine.context;
      const note = full ? `the context of ${engine.context} tokens is full` : tokens >= MOST ? `limit of ${MOST} tokens` : null;
      yield { text, tokens, note };
      if (note) return;
      next = await this.feed([next]);
    }
  }

  async feed(ids) {
    const before = this.fed;
    this.fed = []; // should it fail, nobody knows what the cache holds
    const next = await this.engine.feed(ids);
    this.fed = [...before, ...ids];
    return next;
  }
}

async function get(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`The server has no ${path} (${response.status}). Start it on a folder or file that export wrote.`);
  return response;
}

async function download({ name, bytes }, onBytes) {
  const reader = (await get(`model/${name}`)).body.getReader();
  const content = new Uint8Array(bytes);
  let at = 0;
  for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) {
    if (at + value.length > bytes) break;
    content.set(value, at);
    at += value.length;
    onBytes(value.length);
  }
  if (at !== bytes) throw new Error(`model/${name} has not the ${bytes} bytes that model.json says. Load this page again.`);
  return content;
}
