// llama.cpp in a page: wllama 2.4.0, its build for one thread.
//
// wllama gives probabilities of the last token only, so a window's scored half goes token by token. They are turned
// back into log-probabilities; those that underflow become the smallest f32.

import { download } from './download.mjs';
import { Refusal } from './worker.mjs';

const packages = new URL('../packages/wllama/esm/', import.meta.url);
const SMALLEST = 1.4e-45;

export class WllamaDecoder {
  /** options: {files: names of the GGUF's parts, f32: whether keys and values are kept in f32, n_ctx} */
  static async open(folder, { files, f32, n_ctx }, report) {
    const base = new URL(`../${folder}`, import.meta.url);
    const { Wllama, LoggerWithoutDebug } = await import(new URL('index.js', packages));
    const blobs = [];
    for (const name of files) blobs.push(new Blob([await download(base, name, report)]));
    const said = [];
    const logger = { ...LoggerWithoutDebug, debug() {}, log() {}, warn() {}, error: (...words) => said.push(words.join(' ')) };
    const wllama = new Wllama({ 'single-thread/wllama.wasm': new URL('single-thread/wllama.wasm', packages).href }, { logger });
    report(null, 'Opening the model…');
    const cache = f32 ? { cache_type_k: 'f32', cache_type_v: 'f32' } : {};
    try {
      await wllama.loadModel(blobs, { n_ctx, n_batch: n_ctx, n_threads: 1, seed: 1, flash_attn: false, ...cache });
    } catch (error) {
      throw new Refusal(`llama.cpp (wllama) refuses the model: ${[error?.message ?? error, ...said.slice(-2)].join('; ').slice(0, 300)}`);
    }
    return new WllamaDecoder(wllama, n_ctx, report);
  }

  constructor(wllama, context, report) {
    Object.assign(this, { wllama, context, report });
    this.vocab = wllama.getLoadedContextInfo().n_vocab;
  }

  facts() {
    return { vocab_size: this.vocab };
  }

  /** Float32Array [last − first, vocab]: log-probabilities after positions first … last−1, from an empty cache. */
  async logits(tokens, first, last) {
    if (tokens.length > this.context) throw new Refusal(`a window of ${tokens.length} tokens is longer than ${this.context}`);
    await this.wllama.kvClear();
    if (first) await this.wllama.decode(Array.from(tokens.subarray(0, first)), { skipLogits: true });
    const out = new Float32Array((last - first) * this.vocab);
    for (let position = first; position < last; position++) {
      await this.wllama.decode([tokens[position]], {});
      const row = out.subarray((position - first) * this.vocab, (position - first + 1) * this.vocab);
      for (const { token, p } of await this.wllama.getLogits(-1)) row[token] = Math.log(p > SMALLEST ? p : SMALLEST);
      this.report((position - first + 1) / (last - first), null);
    }
    return out;
  }

  async close() {
    await this.wllama.exit();
  }
}
