// Images that the caller brings.
import { readFile } from 'node:fs/promises';
import { InvalidArgumentError } from './errors.js';

/** An image file: its bytes, or where it lies (a path or a file: URL). */
export type ImageSource = Uint8Array | string | URL;

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
export async function loadImage(source: ImageSource, field: string): Promise<{ data: Uint8Array }> {
  if (source instanceof Uint8Array) return { data: source };
  if (typeof source !== 'string' && !(source instanceof URL)) {
    throw unusable(field, 'must be a Uint8Array, a path or a file: URL');
  }
  try {
    return { data: await readFile(source) };
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
  if (isImageSource(source)) return { image: await loadImage(source, `${field}.image`) };
  if (typeof source !== 'object' || source === null) throw unusable(field, 'must be an image or a style');
  const loaded: Record<string, unknown> = { ...source };
  if ('image' in source) loaded.image = await loadImage(source.image, `${field}.image`);
  if (source.region != null) loaded.region = await loadImage(source.region, `${field}.region`);
  if (source.styleRegion != null) loaded.styleRegion = await loadImage(source.styleRegion, `${field}.style_region`);
  return loaded;
}

function isImageSource(source: StyleSource): source is ImageSource {
  return source instanceof Uint8Array || typeof source === 'string' || source instanceof URL;
}

function unusable(field: string, what: string, cause?: unknown): InvalidArgumentError {
  return new InvalidArgumentError(`${field} ${what}`, { violations: [{ field, description: what }], cause });
}
