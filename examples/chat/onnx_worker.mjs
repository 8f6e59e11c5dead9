// The Web Worker in which ONNX Runtime computes, so that the page stays alive: tokens in, the most likely next one out.

const packages = new URL('packages/onnxruntime-web/dist/', import.meta.url);
let ort, session, decoder;
let pairs; // [input, output] of each layer's keys and values
let cache; // input → tensor [1, heads, length, size]
let length; // tokens in the cache

const calls = {
  async open({ graph, data, decoder: config, device, threads }) {
    decoder = config;
    const { inputs, outputs } = decoder;
    const layers = [...Array(decoder.num_hidden_layers).keys()];
    pairs = [['past_key_names', 'present_key_names'], ['past_value_names', 'present_value_names']].flatMap(([past, present]) =>
      layers.map((layer) => [inputs[past].replace('%d', layer), outputs[present].replace('%d', layer)]));
    ort = await import(new URL(device === 'webgpu' ? 'ort.webgpu.min.mjs' : 'ort.wasm.min.mjs', packages));
    ort.env.wasm.wasmPaths = packages.href;
    ort.env.wasm.numThreads = threads;
    session = await ort.InferenceSession.create(graph, {
      executionProviders: [device],
      externalData: Object.entries(data).map(([path, bytes]) => ({ path, data: bytes })),
      preferredOutputLocation: device === 'webgpu' ? Object.fromEntries(pairs.map(([, present]) => [present, 'gpu-buffer'])) : undefined,
      logSeverityLevel: 3,
    });
    calls.reset();
  },

  reset() {
    cache = Object.fromEntries(pairs.map(([past]) => {
      const { type, shape } = session.inputMetadata.find(({ name }) => name === past);
      const size = (axis, key) => (typeof shape[axis] === 'number' ? shape[axis] : decoder[key]);
      const dims = [1, size(1, 'num_key_value_heads'), 0, size(3, 'head_size')];
      return [past, new ort.Tensor(type, type === 'float16' ? new Uint16Array(0) : new Float32Array(0), dims)];
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
    for (const { name, type } of session.inputMetadata)
      if (values[name]) feeds[name] = integers(type, values[name]);
    const results = await session.run(feeds);
    for (const [past, present] of pairs) {
      cache[past].dispose();
      cache[past] = results[present];
    }
    const { data, dims } = results.logits;
    return argmax(data.subarray(data.length - dims.at(-1)));
  },
};

function integers(type, values) {
  const data = type === 'int64' ? BigInt64Array.from(values, BigInt) : Int32Array.from(values);
  return new ort.Tensor(type, data, [1, values.length]);
}

function argmax(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

onmessage = async ({ data: [name, values] }) => {
  try {
    postMessage({ value: await calls[name](...values) });
  } catch (error) {
    postMessage({ error: String(error?.message ?? error) });
  }
};
