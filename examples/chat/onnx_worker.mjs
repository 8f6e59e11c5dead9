// The Web Worker in which ONNX Runtime computes, so that the page stays alive: tokens in, the most likely next one out.

const packages = new URL('packages/onnxruntime-web/dist/', import.meta.url);
let ort, session, decoder;
let pairs; // [input, output] of what the graph keeps: keys and values, states of convolutions and linear attention
let cache; // input → tensor, of keys and values [1, heads, length, size]
let length; // tokens in the cache

const calls = {
  async open({ graph, data, decoder: config, device, threads }) {
    decoder = config;
    ort = await import(new URL(device === 'webgpu' ? 'ort.webgpu.min.mjs' : 'ort.wasm.min.mjs', packages));
    ort.env.wasm.wasmPaths = packages.href;
    ort.env.wasm.numThreads = threads;
    const options = {
      executionProviders: [device],
      externalData: Object.entries(data).map(([path, bytes]) => ({ path, data: bytes })),
      preferredOutputLocation: device === 'webgpu' ? staysOnGpu(decoder) : undefined,
      logSeverityLevel: 3,
    };
    session = await ort.InferenceSession.create(graph, options);
    const kept = session.inputNames.filter((name) => name.startsWith('past'));
    pairs = kept.map((name) => [name, name.replace(/^past(_key_values)?/, 'present')]);
    calls.reset();
  },

  reset() {
    const open = [1, decoder.num_key_value_heads, 0, decoder.head_size]; // sizes that the graph leaves open
    cache = Object.fromEntries(pairs.map(([past]) => {
      const { type, shape } = session.inputMetadata.find(({ name }) => name === past);
      const dims = shape.map((size, axis) => (typeof size === 'number' ? size : open[axis]));
      const count = dims.reduce((product, size) => product * size, 1);
      return [past, new ort.Tensor(type, type === 'float16' ? new Uint16Array(count) : new Float32Array(count), dims)];
    }));
    length = 0;
  },

  async feed(ids) {
    const start = length;
    length += ids.length;
    const values = {
      input_ids: ids,
      attention_mask: Array(length).fill(1),
      position_ids: ids.map((_, i) => start + i),
    };
    const feeds = { ...cache };
    for (const { name, type, shape } of session.inputMetadata)
      if (values[name]) feeds[name] = integers(type, values[name], shape.length);
    const results = await session.run(feeds);
    for (const [past, present] of pairs) {
      cache[past].dispose();
      cache[past] = results[present];
    }
    const { data, dims } = results.logits;
    return argmax(data.subarray(data.length - dims.at(-1)));
  },
};

/** Names of the outputs that the next call takes, from the templates of genai_config.json. */
function staysOnGpu({ outputs, num_hidden_layers }) {
  const templates = Object.entries(outputs).filter(([key]) => key.startsWith('present_')).map(([, template]) => template);
  const layers = [...Array(num_hidden_layers).keys()];
  return Object.fromEntries(templates.flatMap((template) => layers.map((layer) => [template.replace('%d', layer), 'gpu-buffer'])));
}

/** Of positions with three axes, those of models that read images too, all three are those of the text. */
function integers(type, values, axes) {
  const all = axes === 3 ? [...values, ...values, ...values] : values;
  const data = type === 'int64' ? BigInt64Array.from(all, BigInt) : Int32Array.from(all);
  return new ort.Tensor(type, data, axes === 3 ? [3, 1, values.length] : [1, values.length]);
}

function argmax(values) {
  // Where JavaScript has no Float16Array, f16 comes as its bits: sign and magnitude.
  const ordered = values instanceof Uint16Array ? values.map((bits) => (bits & 0x8000 ? ~bits : bits | 0x8000)) : values;
  let best = 0;
  for (let i = 1; i < ordered.length; i++) if (ordered[i] > ordered[best]) best = i;
  return best;
}

onmessage = async ({ data: [name, values] }) => {
  try {
    postMessage({ value: await calls[name](...values) });
  } catch (error) {
    postMessage({ error: String(error?.message ?? error) });
  }
};
