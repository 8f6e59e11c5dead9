// The worker of JavaScript runtimes: what runtime_tests/worker/__main__.py is for Python ones. `Worker.answer` turns a request
// into a reply; a Refusal is a sentence about the input, anything else ends the worker.

import { digestOf } from './digest.mjs';
import { dequantizeNode } from './onnx_decoder.mjs';

/** One sentence about the input, for the person. */
export class Refusal extends Error {}

export class Worker {
  /**
   * @param engines runtime's name → async (artifact, options, report) → engine with facts() and
   *   logits(tokens, first, last): Float32Array of the predictions at positions first … last−1
   * @param ort async runtime's name → its module, for stored weights
   * @param memory () → bytes that the process has held, or null
   * @param report (fraction, what) → void: progress, for a person who watches
   */
  constructor(engines, ort, memory = () => null, report = () => {}) {
    Object.assign(this, { engines, ort, memory, report });
    this.engine = null;
  }

  /** [header, arrays] of the reply. */
  async answer(header, arrays) {
    try {
      const operation = this.operations[header.op];
      if (!operation) throw new Refusal(`a runtime in JavaScript cannot do ${header.op}`);
      return await operation.call(this, header, arrays);
    } catch (error) {
      if (error instanceof Refusal) return [{ error: error.message }, {}];
      throw error;
    }
  }

  operations = {
    async open({ runtime, artifact, options }) {
      this.engine = await this.engines[runtime](artifact, options, this.report);
      return [{ facts: this.engine.facts() }, {}];
    },
    async logits(_, { tokens }) {
      const started = performance.now();
      const n = tokens.data.length;
      const logits = await this.opened().logits(tokens.data, 0, n);
      return [this.usage(started), { logits: { data: logits, shape: [n, logits.length / n] } }];
    },
    async run({ first, full, top }, { tokens }) {
      const started = performance.now();
      const last = tokens.data.length - 1;
      const logits = await this.opened().logits(tokens.data, first, last);
      if (full) return [this.usage(started), { logits: { data: logits, shape: [last - first, logits.length / (last - first)] } }];
      return [this.usage(started), digestOf(logits, tokens.data.subarray(first + 1), top)];
    },
    async dequantize_node(header, { model }) {
      const weights = await dequantizeNode(await this.ort(header.runtime), model.data, header);
      return [{}, { weights: { data: weights, shape: [header.rows, header.cols] } }];
    },
  };

  close() {
    this.engine?.close?.();
    this.engine = null;
  }

  opened() {
    if (!this.engine) throw new Refusal('no artifact is open');
    return this.engine;
  }

  usage(started) {
    return { seconds: (performance.now() - started) / 1000, peak_memory_bytes: this.memory() };
  }
}
