// The WebGPU device that ONNX Runtime computes on. On a graphics card it makes its own.

import { Refusal } from './worker.mjs';

// The prefill kernel of its attention (flash_attention.wgsl.template) is wrong where a subgroup has four threads, as
// SwiftShader's have: from the fifth token on the output of GroupQueryAttention is another one (tiny-llama with
// onnxruntime-web 1.30: KL 0.06 from torch, 1e-9 on a device without subgroups). So there the device has none.
const FEWEST_THREADS = 8;
// Limits that ONNX Runtime asks for as high as the adapter has them (WebGpuContext::GetRequiredLimits).
const LIMITS = [
  'maxBindGroups',
  'maxComputeWorkgroupStorageSize',
  'maxComputeWorkgroupsPerDimension',
  'maxStorageBufferBindingSize',
  'maxBufferSize',
  'maxComputeInvocationsPerWorkgroup',
  'maxComputeWorkgroupSizeX',
  'maxComputeWorkgroupSizeY',
  'maxComputeWorkgroupSizeZ',
  'maxStorageBuffersPerShaderStage',
];
const FEATURES = ['shader-f16', 'timestamp-query'];

let own = null; // promise of a device for adapters with small subgroups; one for all sessions

/** What to give as an execution provider. */
export async function webgpuProvider() {
  const adapter = await navigator.gpu?.requestAdapter({ powerPreference: 'high-performance' });
  if (!adapter) throw new Refusal('this browser has no WebGPU adapter');
  const least = adapter.info.subgroupMinSize;
  if (!adapter.features.has('subgroups') || !least || least >= FEWEST_THREADS) return { name: 'webgpu' };
  const requiredLimits = Object.fromEntries(LIMITS.map((name) => [name, adapter.limits[name]]));
  const requiredFeatures = FEATURES.filter((name) => adapter.features.has(name));
  own ??= adapter.requestDevice({ requiredLimits, requiredFeatures });
  return { name: 'webgpu', device: await own };
}

/** What computes, for the report. `ort`: the module, after a session was made. */
export async function adapterOf(ort) {
  const device = (await own) ?? (await ort.env.webgpu.device);
  const { vendor, architecture, device: model, description, isFallbackAdapter } = device.adapterInfo;
  return {
    name: [vendor, architecture, model, description].filter(Boolean).join(' ') || 'unnamed',
    software: Boolean(isFallbackAdapter),
    shader_f16: device.features.has('shader-f16'),
    subgroups_left_out: own !== null,
  };
}
