// A GGUF file (or its parts): llama.cpp through wllama, which has a worker, the tokenizer and the chat template within.

import { LoggerWithoutDebug, Wllama } from './packages/@wllama/wllama/esm/index.js';

export const WEIGHTS = /\.gguf$/;
const CONTEXT = 4096; // at most: llama.cpp takes the memory for all of it at the beginning
const wasm = (build) => new URL(`packages/@wllama/wllama/esm/${build}/wllama.wasm`, import.meta.url).href;

/** @param load async () → {name: Uint8Array} of the parts */
export async function open(load) {
  const said = [];
  const logger = { ...LoggerWithoutDebug, log() {}, warn() {}, error: (...words) => said.push(words.join(' ')) };
  const builds = { 'single-thread/wllama.wasm': wasm('single-thread'), 'multi-thread/wllama.wasm': wasm('multi-thread') };
  const wllama = new Wllama(builds, { logger });
  const parts = Object.values(await load()).map((bytes) => new Blob([bytes]));
  try {
    await wllama.loadModel(parts, { n_ctx: CONTEXT, n_threads: Math.min(4, navigator.hardwareConcurrency) });
  } catch (error) {
    throw new Error([error?.message ?? error, ...said].join('; '));
  }
  await wllama.samplingInit({ temp: 0 }); // always the most likely token
  const info = wllama.getLoadedContextInfo();
  const threads = wllama.getNumThreads();
  const word = async (id) => (id < 0 ? '' : wllama.detokenize([id], true));
  return {
    where: `llama.cpp, ${threads} thread${threads > 1 ? 's' : ''}`,
    context: Math.min(info.n_ctx, info.n_ctx_train),
    template: wllama.getChatTemplate(),
    variables: { bos_token: await word(info.token_bos), eos_token: await word(info.token_eos) },
    isEnd: (id) => wllama.isTokenEOG(id),
    async encode(string, special) {
      const ids = await wllama.tokenize(string, !special); // a text of the person's own holds no special tokens
      return special && info.add_bos_token ? [info.token_bos, ...ids] : ids;
    },
    decode: (ids) => wllama.detokenize(ids, true),
    async keep(n) {
      try {
        await wllama.kvRemove(n, -1);
        return n;
      } catch {
        await wllama.kvClear(); // an empty cache, or one whose window has moved on
        return 0;
      }
    },
    async feed(ids) {
      await wllama.decode(ids, {});
      return (await wllama.samplingSample()).token;
    },
  };
}
