// A request as a command for curl and as a program for openai-python. A key is never in them.

const KEY_PLACE = 'YOUR_API_KEY';

const shell = (text) => `'${text.replace(/'/g, `'\\''`)}'`;

/** A JSON value as Python: its strings are Python's too, its words are not. */
function python(value, margin = '') {
  if (value === true) return 'True';
  if (value === false) return 'False';
  const inner = `${margin}    `;
  if (Array.isArray(value)) return `[\n${value.map((one) => `${inner}${python(one, inner)},\n`).join('')}${margin}]`;
  if (typeof value === 'object') {
    const pairs = Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${python(one, margin)}`);
    return `{${pairs.join(', ')}}`;
  }
  return JSON.stringify(value);
}

/** A command; keyed: the server wants a key. */
export function curl(base, body, keyed) {
  return `curl -N ${shell(`${base}/chat/completions`)} \\\n  -H 'Content-Type: application/json' \\\n`
    + `${keyed ? `  -H 'Authorization: Bearer ${KEY_PLACE}' \\\n` : ''}  -d ${shell(JSON.stringify(body, null, 2))}`;
}

/** A program that prints the answer as it arrives. */
export function openaiPython(base, body) {
  const fields = Object.entries(body).map(([name, value]) => `    ${name}=${python(value, '    ')},\n`).join('');
  return `from openai import OpenAI\n\nclient = OpenAI(base_url=${JSON.stringify(base)}, api_key="${KEY_PLACE}")\n`
    + `stream = client.chat.completions.create(\n${fields})\nfor chunk in stream:\n    if chunk.choices:\n`
    + '        print(chunk.choices[0].delta.content or "", end="", flush=True)\nprint()\n';
}
