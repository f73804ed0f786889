// SPDX-License-Identifier: MIT
// What the programs for Node.js share: they print what each call resolves to, and end by themselves.
export const port = Number(process.env.PORT);

export const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

export function print(...values) {
  console.log(...values.map((value) => (value instanceof Error ? value.message
    : typeof value === 'string' ? value : JSON.stringify(value))));
}

// Prints what the promise resolves to, or why it does not.
export async function show(promise) {
  try {
    print((await promise) ?? 'nothing');
  } catch (error) {
    print(error);
  }
}

// Waits until the condition holds.
export async function until(condition) {
  while (!(await condition())) {
    await sleep(10);
  }
}

export function run(main) {
  setTimeout(() => {
    print('HANG');
    process.exit(2);
  }, 40000);
  main().then(() => process.exit(0), (error) => {
    console.log(error);
    process.exit(1);
  });
}
