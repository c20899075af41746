// Float32 tensors in the safetensors format: a length, a JSON header, then the numbers.

type Header = Record<string, { dtype: string; shape: number[]; data_offsets: [number, number] }>;

/** Return a file with one tensor of float32 numbers. */
export function encode(name: string, shape: number[], values: Float32Array): Blob {
  const header = JSON.stringify({ [name]: { dtype: "F32", shape, data_offsets: [0, values.byteLength] } });
  const text = new TextEncoder().encode(header.padEnd(Math.ceil(header.length / 8) * 8));
  const length = new DataView(new ArrayBuffer(8));
  length.setBigUint64(0, BigInt(text.length), true);
  return new Blob([length, text, values as Float32Array<ArrayBuffer>]);
}

/** Return one tensor of a file as its shape and float32 numbers. */
export function decode(file: ArrayBuffer, name: string): { shape: number[]; values: Float32Array } {
  const start = 8 + Number(new DataView(file).getBigUint64(0, true));
  const header: Header = JSON.parse(new TextDecoder().decode(new Uint8Array(file, 8, start - 8)));
  const found = header[name];
  if (found?.dtype !== "F32") throw new Error(`the file has no float32 tensor ${name}`);
  const [begin, end] = found.data_offsets;
  return { shape: found.shape, values: new Float32Array(file.slice(start + begin, start + end)) };
}
