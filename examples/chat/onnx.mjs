// An exported ONNX folder: Hugging Face's tokenizer here, ONNX Runtime in a Web Worker.

import { Tokenizer } from './packages/@huggingface/tokenizers/dist/tokenizers.min.mjs';

export const WEIGHTS = /^model\.onnx(\.data(_\d+)?)?$/;

/**
 * @param load async () → {name: Uint8Array} of the files that WEIGHTS names
 * @param text async name → text of another file of the folder, null without it
 */
export async function open(load, text) {
  const json = async (name, otherwise) => {
    const found = await text(name);
    if (!found) throw new Error(`The folder has no ${name}. ${otherwise}`);
    return JSON.parse(found);
  };
  const { model: genai } = await json('genai_config.json', 'Its graph has no key-value cache: export the run with --format gguf.');
  const [tokens, config] = await Promise.all(['tokenizer.json', 'tokenizer_config.json'].map((name) => json(name, 'Export the run again.')));
  const tokenizer = new Tokenizer(tokens, config);
  const device = new URLSearchParams(location.search).get('device') ?? ((await hasGpu()) ? 'webgpu' : 'wasm');
  const threads = crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  const { 'model.onnx': graph, ...data } = await load();
  const buffers = [graph, ...Object.values(data)].map((bytes) => bytes.buffer);
  const worker = new Calls(new Worker('onnx_worker.mjs', { type: 'module' }));
  await worker.call('open', [{ graph, data, decoder: genai.decoder, device, threads }], buffers).catch(({ message }) => {
    throw new Error(device === 'webgpu' ? `WebGPU: ${message}. Add ?device=wasm to the address to do without it.` : message);
  });
  const ends = [genai.eos_token_id].flat(); // export writes all of generation_config.json here
  let fed = 0;
  return {
    where: `ONNX Runtime, ${device === 'webgpu' ? 'WebGPU' : `${threads} thread${threads > 1 ? 's' : ''}`}`,
    context: genai.context_length,
    template: (await text('chat_template.jinja')) ?? templateOf(config),
    variables: specialTokens(config),
    isEnd: (id) => ends.includes(id),
    encode: async (string, special) => tokenizer.encode(string, { add_special_tokens: special }).ids,
    decode: async (ids) => tokenizer.decode(ids, { skip_special_tokens: true }),
    async keep(n) {
      if (n === fed) return n;
      await worker.call('reset', []); // a cache in tensors is kept whole or not at all
      return (fed = 0);
    },
    async feed(ids) {
      fed += ids.length;
      return worker.call('feed', [ids]);
    },
  };
}

async function hasGpu() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  return Boolean(adapter) && !adapter.info?.isFallbackAdapter; // which computes on the CPU
}

function templateOf({ chat_template: template }) {
  return Array.isArray(template) ? template.find(({ name }) => name === 'default')?.template : template;
}

function specialTokens(config) {
  const named = Object.entries(config).filter(([key]) => key.endsWith('_token'));
  return Object.fromEntries(named.map(([key, token]) => [key, token?.content ?? token]));
}

/** Calls into a worker, one at a time. */
class Calls {
  constructor(worker) {
    this.worker = worker;
    worker.onmessage = ({ data: { value, error } }) => (error === undefined ? this.resolve(value) : this.reject(new Error(error)));
    worker.onerror = (event) => this.reject(new Error(event.message || 'imported module'));
  }
  call(name, values, transferred = []) {
    return new Promise((resolve, reject) => {
      Object.assign(this, { resolve, reject });
      this.worker.postMessage([name, values], transferred);
    });
  }
}
