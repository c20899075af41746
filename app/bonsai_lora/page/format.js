// Numbers and times for people.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(size) {
  let unit = 0;
  while (size >= 1024 && unit < UNITS.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? size : size.toPrecision(3)} ${UNITS[unit]}`;
}

export function count(number) {
  return number.toLocaleString("en");
}

/** Return a number with three significant digits. */
export function short(number) {
  if (number === null || number === undefined) return "–";
  if (number === 0) return "0";
  const size = Math.abs(number);
  if (size >= 1e5 || size < 1e-3) return number.toExponential(2);
  return String(Number(number.toPrecision(3)));
}

export function percent(share) {
  if (share > 0 && share < 1e-4) return "under 0.01 %";
  return `${short(share * 100)} %`;
}

export function seconds(time) {
  if (time === null || time === undefined) return "–";
  if (time < 1e-3) return `${short(time * 1e6)} µs`;
  if (time < 1) return `${short(time * 1e3)} ms`;
  if (time < 120) return `${short(time)} s`;
  if (time < 7200) return `${Math.round(time / 60)} min`;
  if (time < 172_800) return `${Math.round(time / 3600)} h`;
  return `${Math.round(time / 86_400)} days`;
}

/** Return how long ago a time in RFC 3339 was. */
export function age(text) {
  return seconds(Math.max(1, (Date.now() - Date.parse(text)) / 1000));
}
