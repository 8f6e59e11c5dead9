// The Web Worker in which onnxruntime-web computes: requests in, replies out, progress in between.

import { download } from './download.mjs';
import { OnnxDecoder } from './onnx_decoder.mjs';
import { Worker as Requests } from './worker.mjs';

const packages = new URL('../packages/onnxruntime-web/dist/', import.meta.url);
const report = (fraction, text) => postMessage({ progress: [fraction, text] });

async function ort(runtime) {
  const build = runtime === 'onnxruntime-webgpu' ? 'webgpu' : 'wasm';
  const module = await import(new URL(`ort.${build}.min.mjs`, packages));
  module.env.wasm.numThreads = 1;
  module.env.wasm.wasmPaths = packages.href;
  return module;
}

const open = (runtime) => async (folder, options) => {
  const base = new URL(`../${folder}`, import.meta.url);
  return OnnxDecoder.open(await ort(runtime), runtime, options, (name) => download(base, name, report));
};

const engines = { 'onnxruntime-web': open('onnxruntime-web'), 'onnxruntime-webgpu': open('onnxruntime-webgpu') };
const requests = new Requests(engines, ort, () => null, report);

onmessage = async ({ data: [header, arrays] }) => {
  try {
    postMessage({ reply: await requests.answer(header, arrays) });
  } catch (error) {
    postMessage({ failure: `${error?.name ?? 'Error'}: ${error?.message ?? error}` });
  }
};
