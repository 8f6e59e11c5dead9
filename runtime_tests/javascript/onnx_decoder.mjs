// A decoder in ONNX Runtime's JavaScript API (onnxruntime-web or onnxruntime-node), one thread.

import { Refusal } from './worker.mjs';
import { withPlacements } from './placements.mjs';
import { adapterOf, webgpuProvider } from './webgpu.mjs';

// Runtime → the one execution provider that its sessions ask for; ONNX Runtime adds its CPU provider behind each.
const PROVIDERS = { 'onnxruntime-web': () => 'wasm', 'onnxruntime-webgpu': webgpuProvider, 'onnxruntime-node': () => 'cpu' };
// At which accuracy level ONNX Runtime fuses DequantizeLinear and MatMul into MatMulNBits. Its own default is 4; a folder
// says its level in genai_config.json, for onnxruntime-genai.
const FUSED_LEVEL = 'qdq_matmulnbits_accuracy_level';
const NAMED = ['input_ids', 'attention_mask', 'position_ids'];
const IDENTITY_ROWS = 512;
const MULTIPLIERS = ['MatMulNBits', 'QMoE']; // they are given the identity

export class OnnxDecoder {
  /**
   * @param ort the module
   * @param runtime "onnxruntime-web" or "onnxruntime-webgpu"
   * @param options {model: name of the .onnx file, external: names of its data files, decoder: of genai_config.json}
   * @param read async name → Uint8Array
   */
  static async open(ort, runtime, { model, external, decoder }, read) {
    const externalData = [];
    for (const name of external) externalData.push({ path: name, data: await read(name) });
    return OnnxDecoder.create(ort, await read(model), runtime, { externalData }, decoder);
  }

  /** The same for onnxruntime-node, which reads files itself. */
  static async openFile(ort, { decoder }, path) {
    return OnnxDecoder.create(ort, path, 'onnxruntime-node', { intraOpNumThreads: 1, interOpNumThreads: 1 }, decoder);
  }

  static async create(ort, model, runtime, options, decoder) {
    let session, placements;
    const level = decoder.session_options?.[`session.${FUSED_LEVEL}`] ?? '0';
    try {
      ({ session, placements } = await createSession(ort, model, runtime, { ...options, extra: { session: { [FUSED_LEVEL]: level } } }));
    } catch (error) {
      if (error instanceof Refusal) throw error;
      throw new Refusal(`ONNX Runtime refuses the model: ${firstLine(error)}`);
    }
    const unknown = session.inputNames.filter((name) => !NAMED.includes(name) && !name.startsWith('past'));
    if (!session.inputNames.includes('input_ids') || !session.outputNames.includes('logits') || unknown.length)
      throw new Refusal(`the model is not a decoder that verify can feed: inputs ${session.inputNames.slice(0, 4)}…; export it again`);
    const adapter = runtime === 'onnxruntime-webgpu' ? await adapterOf(ort) : null;
    return new OnnxDecoder(ort, session, decoder, { placements, adapter });
  }

  constructor(ort, session, config, where) {
    Object.assign(this, { ort, session, config, where });
    this.inputs = new Map(session.inputMetadata.map((input) => [input.name, input]));
  }

  facts() {
    const shape = this.session.outputMetadata.find((output) => output.name === 'logits')?.shape ?? [];
    const width = shape[shape.length - 1];
    return { vocab_size: typeof width === 'number' ? width : null, ...this.where };
  }

  /** Float32Array [last − first, vocab]: the predictions at positions first … last−1, from an empty cache. */
  async logits(tokens, first, last) {
    const n = tokens.length;
    const feeds = {};
    for (const name of this.session.inputNames) feeds[name] = this.feed(name, tokens);
    let logits;
    try {
      ({ logits } = await this.session.run(feeds, ['logits']));
    } catch (error) {
      throw new Refusal(`ONNX Runtime could not run the model: ${firstLine(error)}`);
    }
    if (logits.dims.length !== 3 || logits.dims[1] !== n)
      throw new Refusal(`the model gives logits of shape ${logits.dims} for ${n} tokens; verify needs them at every position`);
    const vocab = logits.dims[2];
    const data = logits.type === 'float32' ? logits.data : floatsOf(logits.data);
    const part = data.slice(first * vocab, last * vocab);
    logits.dispose();
    return part;
  }

  feed(name, tokens) {
    const input = this.inputs.get(name);
    const { Tensor } = this.ort;
    const n = tokens.length;
    if (name === 'input_ids') return this.integers(input, [1, n], (i) => tokens[i]);
    if (name === 'attention_mask') return this.integers(input, [1, n], () => 1);
    // Three numbers a token in models that also read images.
    if (name === 'position_ids') return this.integers(input, input.shape.length === 3 ? [3, 1, n] : [1, n], (i) => i % n);
    // The state of a convolution or of linear attention leaves only the batch open.
    const sizes = input.shape.slice(1);
    if (sizes.length && sizes.every((size) => typeof size === 'number' && size > 0)) {
      const count = sizes.reduce((product, size) => product * size, 1);
      return new Tensor(input.type, input.type === 'float16' ? new Uint16Array(count) : new Float32Array(count), [1, ...sizes]);
    }
    const known = (value, key) => (typeof value === 'number' && value > 0 ? value : this.config[key]);
    const heads = known(input.shape[1], 'num_key_value_heads');
    const size = known(input.shape[3], 'head_size');
    if (input.shape.length !== 4 || !heads || !size)
      throw new Refusal(`input ${name} has the shape ${input.shape}, which is no key-value cache`);
    const empty = input.type === 'float16' ? new Uint16Array(0) : new Float32Array(0);
    return new Tensor(input.type, empty, [1, heads, 0, size]);
  }

  integers(input, dims, value) {
    const { Tensor } = this.ort;
    const count = dims.reduce((product, size) => product * size, 1);
    if (input.type === 'int64') return new Tensor('int64', BigInt64Array.from({ length: count }, (_, i) => BigInt(value(i))), dims);
    if (input.type === 'int32') return new Tensor('int32', Int32Array.from({ length: count }, (_, i) => value(i)), dims);
    throw new Refusal(`input ${input.name} has type ${input.type}, which verify cannot feed`);
  }
}

/** Float32Array of f16 values: engines without Float16Array (Node 20) give their bits as a Uint16Array. */
function floatsOf(data) {
  if (!(data instanceof Uint16Array)) return Float32Array.from(data);
  return Float32Array.from(data, (bits) => {
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    const sign = bits & 0x8000 ? -1 : 1;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : (fraction / 1024) * 2 ** -14);
  });
}

/** Float32Array [rows, cols] of one node's weights: see `NodeModel` in runtime_tests/worker/onnx_dequantize.py. */
export async function dequantizeNode(ort, model, { runtime, node_op, rows, cols, dtype }) {
  if (dtype !== 'float32') throw new Refusal(`scales of ${dtype} cannot be compared in JavaScript`);
  let session, placements;
  try {
    ({ session, placements } = await createSession(ort, model, runtime, { intraOpNumThreads: 1 }));
    if (placements?.CPUExecutionProvider) throw new Error(`${node_op} with these bits and blocks does not run on WebGPU`);
    if (!MULTIPLIERS.includes(node_op)) {
      const ids = BigInt64Array.from({ length: rows }, (_, i) => BigInt(i));
      const { Y } = await session.run({ X: new ort.Tensor('int64', ids, [rows]) });
      return Y.data.slice();
    }
    const weights = new Float32Array(rows * cols);
    for (let start = 0; start < cols; start += IDENTITY_ROWS) {
      const count = Math.min(IDENTITY_ROWS, cols - start);
      const identity = new Float32Array(count * cols);
      for (let i = 0; i < count; i++) identity[i * cols + start + i] = 1;
      const { Y } = await session.run({ X: new ort.Tensor('float32', identity, [count, cols]) });
      for (let i = 0; i < count; i++) for (let row = 0; row < rows; row++) weights[row * cols + start + i] = Y.data[i * rows + row];
    }
    return weights;
  } catch (error) {
    throw new Refusal(firstLine(error));
  } finally {
    await session?.release();
  }
}

/** {session, placements}: see `withPlacements`; null for CPU providers, which run every node. */
async function createSession(ort, model, runtime, options) {
  const executionProviders = [await PROVIDERS[runtime]()];
  const create = (severity) => ort.InferenceSession.create(model, { ...options, executionProviders, logSeverityLevel: severity });
  if (runtime !== 'onnxruntime-webgpu') return { session: await create(4), placements: null };
  const [session, placements] = await withPlacements(() => create(0));
  return { session, placements };
}

function firstLine(error) {
  return String(error?.message ?? error).trim().split('\n')[0].slice(0, 300);
}
