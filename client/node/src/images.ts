// Images that the caller brings.
import { readFile } from 'node:fs/promises';
import { InvalidArgumentError } from './errors.js';
import { isObject } from './plain.js';

/** An image file: its bytes, or where it lies (a path or a file: URL). */
export type ImageFile = Uint8Array | string | URL;

/** An image: a file, or by its name (`images/…`) one that is on the server: what `uploadImage` gave, or a result. */
export type ImageSource = ImageFile | { readonly name: string };

/** What can be said of a style. A mask is an image, white where it holds, black elsewhere, grey in between. */
export interface StyleSettings {
  /** Share relative to the other styles'. Default: 1. */
  readonly weight?: number | undefined;
  /** Where in the picture the style belongs: a mask of the photograph's proportions. Default: where no region is. */
  readonly region?: ImageSource | undefined;
  /** Which part of the style image to take the style from: a mask of its proportions. Default: all of it. */
  readonly styleRegion?: ImageSource | undefined;
}

/** A style of a picture: an image, or the name of a stored style; alone or with its weight and masks. */
export type StyleSource =
  ImageSource | ({ readonly image: ImageSource } & StyleSettings) | ({ readonly style: string } & StyleSettings);

/** One image of a stored style, alone or with its weight. */
export type StyleImageSource = ImageSource | { readonly image: ImageSource; readonly weight?: number | undefined };

/** An Image message. `field` is where it stands in the request. */
export async function loadImage(source: ImageSource, field: string): Promise<{ data: Uint8Array } | { name: string }> {
  if (!isStored(source)) return { data: await loadFile(source, field) };
  const { name } = source;
  if (!String(name).startsWith('images/')) throw unusable(field, `must be a stored image, images/…, not ${name}`);
  return { name };
}

/** The bytes of a file. `field` is where it stands in the request. */
export async function loadFile(source: ImageFile, field: string): Promise<Uint8Array> {
  if (source instanceof Uint8Array) return source;
  if (typeof source !== 'string' && !(source instanceof URL)) {
    throw unusable(field, 'must be a Uint8Array, a path, a file: URL or a stored image');
  }
  try {
    return await readFile(source);
  } catch (error) {
    throw unusable(field, `cannot be read: ${(error as Error).message}`, error);
  }
}

/** StyleInput messages, or the StyleImage messages of a stored style. */
export async function loadStyles(sources: readonly StyleSource[], field: string): Promise<object[]> {
  if (!Array.isArray(sources)) throw unusable(field, 'must be an array');
  return Promise.all(sources.map((source, index) => loadStyle(source, `${field}[${index}]`)));
}

async function loadStyle(source: StyleSource, field: string): Promise<object> {
  if (isStored(source) || isFile(source)) return { image: await loadImage(source, `${field}.image`) };
  if (typeof source !== 'object' || source === null) throw unusable(field, 'must be an image or a style');
  const loaded: Record<string, unknown> = { ...source };
  if ('image' in source) loaded.image = await loadImage(source.image, `${field}.image`);
  if (source.region != null) loaded.region = await loadImage(source.region, `${field}.region`);
  if (source.styleRegion != null) loaded.styleRegion = await loadImage(source.styleRegion, `${field}.style_region`);
  return loaded;
}

function isFile(source: StyleSource): source is ImageFile {
  return source instanceof Uint8Array || typeof source === 'string' || source instanceof URL;
}

function isStored(source: StyleSource): source is { readonly name: string } {
  return isObject(source) && 'name' in source;
}

function unusable(field: string, what: string, cause?: unknown): InvalidArgumentError {
  return new InvalidArgumentError(`${field} ${what}`, { violations: [{ field, description: what }], cause });
}
