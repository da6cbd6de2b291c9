// node read_store.mjs STORE: every array below attributes.eupe as JSON, {path: {dtype, shape, bits}}.
// Bits are unsigned integers of the element's width, in row-major order; as strings, for JSON has no 64-bit integers.

import { Float16Array } from "@petamoriken/float16";

// zarrita takes the global Float16Array, which Node has from version 24 on; without one it says "Not found: v2 array".
globalThis.Float16Array ??= Float16Array;

const zarr = await import("zarrita");
const { default: FileSystemStore } = await import("@zarrita/storage/fs");

const UINT = {
  bool: Uint8Array,
  float16: Uint16Array,
  int8: Uint8Array,
  int32: Uint32Array,
  float64: BigUint64Array,
  int64: BigUint64Array,
  uint64: BigUint64Array,
};

const root = zarr.root(new FileSystemStore(process.argv[2]));
const { eupe } = (await zarr.open(root, { kind: "group" })).attrs;
const kinds = [...eupe.tokens, ...Object.keys(eupe.layers ?? {}).map((number) => `dense-${number}`)];
const features = eupe.sizes.flatMap((size) => kinds.map((kind) => `${size}/${kind}`));
const statistics = ["count", "mean", "std", "cov", "norms"];
const stats = features.flatMap((path) => statistics.map((name) => `stats/${path}/${name}`));

const arrays = {};
for (const path of ["boxes", "flips", "digests", ...features, ...stats]) {
  arrays[path] = await readArray(path);
}
const [row, view] = [eupe.samples_per_part, eupe.views.num_views - 1];
for (const path of features) {
  arrays[`${path}[${row},${view}]`] = await readArray(path, [row, view]);
}
console.log(JSON.stringify({ format: eupe.format, arrays }));

/** An array, or the part of it at the first few indices. */
async function readArray(path, indices = []) {
  const array = await zarr.open(root.resolve(path), { kind: "array" });
  if (array.shape.length === 0) {
    const value = BigInt.asUintN(64, await zarr.get(array));
    return { dtype: array.dtype, shape: [], bits: [String(value)] };
  }
  const selection = array.shape.map((_, axis) => indices[axis] ?? null);
  const { data, shape, stride } = await zarr.get(array, selection);
  const bits = new UINT[array.dtype](data.buffer, data.byteOffset, data.length);
  return { dtype: array.dtype, shape, bits: rowMajor(bits, shape, stride) };
}

/** What zarrita gives lies as the store's transpose left it, so elements are found by their strides. */
function rowMajor(bits, shape, stride) {
  const size = shape.reduce((a, b) => a * b, 1);
  return Array.from({ length: size }, (_, i) => String(bits[offset(shape, stride, i)]));
}

/** Place in memory of the i-th element in row-major order. */
function offset(shape, stride, i) {
  let place = 0;
  for (let axis = shape.length - 1; axis >= 0; axis--) {
    place += (i % shape[axis]) * stride[axis];
    i = Math.floor(i / shape[axis]);
  }
  return place;
}
