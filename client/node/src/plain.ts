// Between the contract's messages and plain JavaScript values.
//
// Both directions walk the contract's descriptors, and the types are mapped from the generated ones, so a field added
// to a .proto is here after the next build. Plain means: `JOB_STATE_RUNNING` is 'running', a Timestamp is a Date, a
// google.protobuf.Value is the value, and what is absent is undefined.
import type { EnumTypeDefinition, MessageTypeDefinition } from '@grpc/proto-loader';
import { definitions } from './contract.js';
import { InvalidArgumentError } from './errors.js';
import type { Timestamp } from './generated/google/protobuf/Timestamp.js';
import type { Value } from './generated/google/protobuf/Value.js';

type Same<A, B> = [A] extends [B] ? ([B] extends [A] ? true : false) : false;
type EnumPrefix<Names> = Names extends `${infer Prefix}UNSPECIFIED` ? Prefix : never;
type WithoutPrefix<Names, Prefix extends string> = Names extends `${Prefix}${infer Rest}` ? Lowercase<Rest> : never;

/** The choices of an enum: `JOB_STATE_RUNNING` is 'running'. A choice newer than this client is 'unspecified'. */
export type Choice<Names> = WithoutPrefix<Names, EnumPrefix<Names>>;

/** What a google.protobuf.Value can hold. */
export type JsonValue = null | boolean | number | string | JsonValue[] | { [key: string]: JsonValue };

/** A message as this client returns it. */
export type Plain<T> =
  Same<T, Timestamp> extends true
    ? Date
    : Same<T, Value> extends true
      ? JsonValue
      : [T] extends [string]
        ? string extends T
          ? string
          : Choice<T>
        : [T] extends [number | boolean | Uint8Array]
          ? T
          : [T] extends [(infer Item)[]]
            ? Plain<Item>[]
            : string extends keyof T
              ? { [Key in keyof T]: Plain<T[Key]> }
              : { [Key in keyof T as null extends T[Key] ? never : Key]: Plain<NonNullable<T[Key]>> } & {
                  [Key in keyof T as null extends T[Key] ? Key : never]?: Plain<NonNullable<T[Key]>>;
                };

/** A message as this client takes it: what is left out has the default written at the field. */
export type Input<T> = [T] extends [string]
  ? string extends T
    ? string
    : Exclude<Choice<T>, 'unspecified'>
  : [T] extends [number | boolean | Uint8Array]
    ? T
    : string extends keyof T
      ? { readonly [Key in keyof T]: Input<T[Key]> }
      : { readonly [Key in keyof T]?: Input<NonNullable<T[Key]>> | undefined };

interface Field {
  name: string;
  label: string;
  type: string;
  typeName: string;
}

interface Descriptor {
  name: string;
  field: Field[];
  nestedType: Descriptor[];
  options: { mapEntry?: boolean } | null;
}

type Fields = Record<string, unknown>;

/** A received message as plain values. */
export function toPlain<In, Out>(definition: MessageTypeDefinition<In, Out>, message: Out): Plain<Out> {
  return readMessage(definition.type as Descriptor, message as Fields) as Plain<Out>;
}

/**
 * A message to send, made of plain values. Raises InvalidArgumentError for what the wire format would silently bend:
 * a field that does not exist, a fraction or an overflow in an integer, a choice that there is not. Bounds are the
 * server's to check. `path` is where the message stands in the request.
 */
export function fromPlain<In, Out>(definition: MessageTypeDefinition<In, Out>, plain: object, path = ''): In {
  return writeMessage(definition.type as Descriptor, plain, path) as In;
}

function readMessage(descriptor: Descriptor, message: Fields): Fields {
  const plain: Fields = {};
  for (const field of descriptor.field) {
    const value = message[field.name];
    if (value !== undefined && value !== null) plain[field.name] = readField(descriptor, field, value);
  }
  return plain;
}

function readField(descriptor: Descriptor, field: Field, value: unknown): unknown {
  const item = mapValue(descriptor, field);
  if (item) return mapEntries(value as Fields, (entry) => readOne(item, entry));
  if (field.label === 'LABEL_REPEATED') return (value as unknown[]).map((entry) => readOne(field, entry));
  return readOne(field, value);
}

function readOne(field: Field, value: unknown): unknown {
  if (field.type === 'TYPE_ENUM') return enumOf(field).plain(value);
  if (field.type !== 'TYPE_MESSAGE') return value;
  if (field.typeName === 'google.protobuf.Timestamp') return readTimestamp(value as Timestamp);
  if (field.typeName === 'google.protobuf.Value') return readValue(value as Value);
  return readMessage(messageOf(field), value as Fields);
}

function readTimestamp({ seconds, nanos }: Timestamp): Date {
  return new Date(seconds * 1000 + nanos / 1e6);
}

function readValue(value: Value): JsonValue {
  if (value.structValue) return mapEntries(value.structValue.fields, readValue);
  if (value.listValue) return value.listValue.values.map(readValue);
  return value.numberValue ?? value.stringValue ?? value.boolValue ?? null;
}

function writeMessage(descriptor: Descriptor, plain: unknown, path: string): Fields {
  if (!isObject(plain)) throw invalid(path, `must be an object, not ${show(plain)}`);
  const fields = new Map(descriptor.field.map((field) => [field.name, field]));
  const message: Fields = {};
  for (const [key, value] of Object.entries(plain)) {
    const field = fields.get(key);
    const at = path ? `${path}.${snakeCase(key)}` : snakeCase(key);
    if (!field) throw invalid(at, `is not a field; there are ${[...fields.keys()].join(', ')}`);
    if (value !== undefined && value !== null) message[key] = writeField(descriptor, field, value, at);
  }
  return message;
}

function writeField(descriptor: Descriptor, field: Field, value: unknown, path: string): unknown {
  const item = mapValue(descriptor, field);
  if (item) {
    if (!isObject(value)) throw invalid(path, `must be an object, not ${show(value)}`);
    return mapEntries(value, (entry, key) => writeOne(item, entry, `${path}[${key}]`));
  }
  if (field.label === 'LABEL_REPEATED') {
    if (!Array.isArray(value)) throw invalid(path, `must be an array, not ${show(value)}`);
    return value.map((entry, index) => writeOne(field, entry, `${path}[${index}]`));
  }
  return writeOne(field, value, path);
}

const INTEGER_RANGE: Record<string, [number, number]> = {
  TYPE_INT32: [-(2 ** 31), 2 ** 31 - 1],
  TYPE_UINT32: [0, 2 ** 32 - 1],
  TYPE_INT64: [Number.MIN_SAFE_INTEGER, Number.MAX_SAFE_INTEGER],
};

const JAVASCRIPT_TYPE: Record<string, string> = {
  TYPE_DOUBLE: 'number',
  TYPE_FLOAT: 'number',
  TYPE_STRING: 'string',
  TYPE_BOOL: 'boolean',
};

function writeOne(field: Field, value: unknown, path: string): unknown {
  if (field.type === 'TYPE_MESSAGE') return writeMessage(messageOf(field), value, path);
  if (field.type === 'TYPE_ENUM') return enumOf(field).wire(value, path);
  if (field.type === 'TYPE_BYTES' && !(value instanceof Uint8Array)) {
    throw invalid(path, `must be a Uint8Array, not ${show(value)}`);
  }
  const type = JAVASCRIPT_TYPE[field.type];
  if (type && typeof value !== type) throw invalid(path, `must be a ${type}, not ${show(value)}`);
  const range = INTEGER_RANGE[field.type];
  if (range && !(Number.isInteger(value) && (value as number) >= range[0] && (value as number) <= range[1])) {
    throw invalid(path, `must be a whole number from ${range[0]} to ${range[1]}, not ${show(value)}`);
  }
  return value;
}

/** One enum of the contract, with its names on the wire and in plain values. */
class Enum {
  readonly #prefix: string;
  readonly #choices: string[];

  constructor(definition: EnumTypeDefinition) {
    const [unspecified, ...names] = (definition.type as { value: { name: string }[] }).value.map(({ name }) => name);
    this.#prefix = unspecified!.slice(0, -'UNSPECIFIED'.length);
    this.#choices = names.map((name) => this.plain(name));
  }

  /** A choice that this client does not know arrives as a number. */
  plain(name: unknown): string {
    return typeof name === 'string' ? name.slice(this.#prefix.length).toLowerCase() : 'unspecified';
  }

  wire(choice: unknown, path: string): string {
    if (this.#choices.includes(choice as string)) return this.#prefix + String(choice).toUpperCase();
    throw invalid(path, `must be one of ${this.#choices.map(show).join(', ')}, not ${show(choice)}`);
  }
}

const enums = new Map<string, Enum>();

function enumOf(field: Field): Enum {
  let found = enums.get(field.typeName);
  if (!found) enums.set(field.typeName, (found = new Enum(definitionOf(field) as EnumTypeDefinition)));
  return found;
}

function messageOf(field: Field): Descriptor {
  return definitionOf(field).type as Descriptor;
}

/** The loader names types of the same package without the package. */
function definitionOf(field: Field): { type: object } {
  const found = definitions[`nst.v1.${field.typeName}`] ?? definitions[field.typeName];
  if (!found) throw new Error(`the contract has no ${field.typeName}`);
  return found as { type: object };
}

/** The value field of a map; undefined if `field` is not a map. */
function mapValue(descriptor: Descriptor, field: Field): Field | undefined {
  if (field.type !== 'TYPE_MESSAGE') return undefined;
  const entry = descriptor.nestedType.find(({ name, options }) => options?.mapEntry && name === field.typeName);
  return entry?.field.find(({ name }) => name === 'value');
}

function mapEntries<A, B>(values: Record<string, A>, change: (value: A, key: string) => B): Record<string, B> {
  return Object.fromEntries(Object.entries(values).map(([key, value]) => [key, change(value, key)]));
}

export function isObject(value: unknown): value is Fields {
  return typeof value === 'object' && value !== null && !Array.isArray(value) && !(value instanceof Uint8Array);
}

function invalid(field: string, what: string): InvalidArgumentError {
  return new InvalidArgumentError(`${field} ${what}`, { violations: [{ field, description: what }] });
}

function show(value: unknown): string {
  if (typeof value === 'string') return JSON.stringify(value);
  if (value instanceof Uint8Array) return 'bytes';
  if (Array.isArray(value)) return 'an array';
  return typeof value === 'object' && value !== null ? 'an object' : String(value);
}

/** A field's name as this client writes it. */
export function camelCase(name: string): string {
  return name.replace(/_([a-z])/g, (_, letter: string) => letter.toUpperCase());
}

/** A field's name as the .proto and the server's messages write it. */
function snakeCase(name: string): string {
  return name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
}
