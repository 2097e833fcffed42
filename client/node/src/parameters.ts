// How a picture was made: the parameters that every result carries, as JSON in its EXIF field ImageDescription.
import { contract } from './contract.js';
import { InvalidArgumentError } from './errors.js';
import { imageDescription } from './exif.js';
import { loadFile, type ImageFile } from './images.js';
import type { StopReason, StylizeOptions } from './messages.js';
import { camelCase, fromPlain, isObject } from './plain.js';

/** A style as it was when a picture was made. */
export interface StyleRecord {
  /** `styles/…`; undefined for an image that was brought along. */
  readonly name: string | undefined;
  /** SHA-256 of each of its image files, 64 lowercase hexadecimal digits. */
  readonly sha256: readonly string[];
  /** Share relative to the other styles'. */
  readonly weight: number;
  /** SHA-256 of the mask's file; undefined without a region. */
  readonly regionSha256: string | undefined;
  /** SHA-256 of the mask's file; undefined if all of the style image was used. */
  readonly styleRegionSha256: string | undefined;
}

/** How a picture was made. */
export interface PictureParameters {
  /** Version of the server that made it. */
  readonly version: string;
  /** Name of the feature model. */
  readonly model: string;
  /** SHA-256 of the file that the model's weights were published in. */
  readonly modelSha256: string;
  /** Every option. With the same model and images, `stylize({ …, model, options })` makes the picture again. */
  readonly options: StylizeOptions;
  /** SHA-256 of the photograph's file. */
  readonly contentSha256: string;
  readonly styles: readonly StyleRecord[];
  /** SHA-256 of the file of the picture it started from; undefined if it started from none. */
  readonly initImageSha256: string | undefined;
  /** The objective at this picture; NaN if it was not a number. */
  readonly loss: number;
  /** The iteration whose picture this is. */
  readonly iteration: number;
  /** Why the optimization ended there. */
  readonly stopReason: StopReason;
}

/**
 * How a result was made: a file in PNG, JPEG, WebP or TIFF. Raises InvalidArgumentError if it is no such file, if it
 * carries no parameters, or those of a newer version, which this client does not understand.
 */
export async function readParameters(source: ImageFile): Promise<PictureParameters> {
  const name = source instanceof Uint8Array ? 'the picture' : String(source);
  const recorded = parse(description(await loadFile(source, 'picture'), name));
  if (!isObject(recorded) || !('nst' in recorded)) {
    throw new InvalidArgumentError(
      `${name} carries no parameters of nst: it was made by something else, or a program has removed them`,
    );
  }
  const parameters = read(recorded, name);
  checkOptions(parameters, name);
  return parameters;
}

function description(data: Uint8Array, name: string): string | undefined {
  try {
    return imageDescription(Buffer.from(data.buffer, data.byteOffset, data.byteLength));
  } catch (error) {
    throw new InvalidArgumentError(`${name} is not an image file that can be read: ${(error as Error).message}`, {
      cause: error,
    });
  }
}

function parse(text: string | undefined): unknown {
  try {
    return JSON.parse(text ?? '');
  } catch {
    return undefined;
  }
}

function read(recorded: Record<string, unknown>, name: string): PictureParameters {
  try {
    return {
      version: String(recorded.nst),
      model: checked('string', recorded.model),
      modelSha256: checked('string', recorded.model_sha256),
      options: readOptions(recorded.options),
      contentSha256: checked('string', recorded.content_sha256),
      styles: checkedArray(recorded.styles).map(readStyle),
      initImageSha256: optional(recorded.init_image_sha256),
      // JSON has no word for what is not a number.
      loss: recorded.loss === null ? NaN : checked('number', recorded.loss),
      iteration: checked('number', recorded.iteration),
      stopReason: readStopReason(recorded.stop_reason),
    };
  } catch (error) {
    throw new InvalidArgumentError(`the parameters in ${name} are damaged: ${(error as Error).message}`, {
      cause: error,
    });
  }
}

function readStyle(recorded: unknown): StyleRecord {
  if (!isObject(recorded)) throw new TypeError('a style is not an object');
  return {
    name: optional(recorded.name),
    sha256: checkedArray(recorded.sha256).map((sha256) => checked('string', sha256)),
    weight: checked('number', recorded.weight),
    regionSha256: optional(recorded.region_sha256),
    styleRegionSha256: optional(recorded.style_region_sha256),
  };
}

function readOptions(recorded: unknown): StylizeOptions {
  if (!isObject(recorded)) throw new TypeError('the options are not an object');
  return Object.fromEntries(Object.entries(recorded).map(([name, value]) => [camelCase(name), value]));
}

/** A reason newer than this client is 'unspecified'. */
function readStopReason(reason: unknown): StopReason {
  try {
    fromPlain(contract.Result, { stopReason: reason });
    return reason as StopReason;
  } catch {
    return 'unspecified';
  }
}

function checkOptions({ options, version }: PictureParameters, name: string): void {
  try {
    fromPlain(contract.StylizeOptions, options, 'options');
  } catch (error) {
    const { message, violations } = error as InvalidArgumentError;
    throw new InvalidArgumentError(`${name} is from a newer version, nst ${version}: ${message}`, {
      violations: [...violations],
      cause: error,
    });
  }
}

interface Types {
  string: string;
  number: number;
}

function checked<Name extends keyof Types>(type: Name, value: unknown): Types[Name] {
  if (typeof value !== type) throw new TypeError(`${JSON.stringify(value)} is not a ${type}`);
  return value as Types[Name];
}

function checkedArray(value: unknown): unknown[] {
  if (!Array.isArray(value)) throw new TypeError(`${JSON.stringify(value)} is not an array`);
  return value;
}

function optional(value: unknown): string | undefined {
  return value === undefined ? undefined : checked('string', value);
}
