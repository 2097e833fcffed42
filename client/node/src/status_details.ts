// The google.rpc details that travel in the trailer `grpc-status-details-bin`: only what this service sends of
// google/rpc/status.proto and google/rpc/error_details.proto, written down here because no contract of ours has it.
import type { Metadata } from '@grpc/grpc-js';
import { fromJSON, type MessageTypeDefinition } from '@grpc/proto-loader';

/** A field at fault. */
export interface FieldViolation {
  /** Where it stands in the request, as the contract writes it: `options.iterations`. */
  readonly field: string;
  /** What is wrong with it. */
  readonly description: string;
}

interface Any {
  typeUrl: string;
  value: Buffer;
}

const messages = {
  nested: {
    Status: { fields: { details: { rule: 'repeated', type: 'Any', id: 3 } } },
    Any: { fields: { typeUrl: { type: 'string', id: 1 }, value: { type: 'bytes', id: 2 } } },
    ErrorInfo: {
      fields: { reason: { type: 'string', id: 1 }, metadata: { keyType: 'string', type: 'string', id: 3 } },
    },
    BadRequest: { fields: { fieldViolations: { rule: 'repeated', type: 'FieldViolation', id: 1 } } },
    FieldViolation: { fields: { field: { type: 'string', id: 1 }, description: { type: 'string', id: 2 } } },
    RetryInfo: { fields: { retryDelay: { type: 'Duration', id: 1 } } },
    Duration: { fields: { seconds: { type: 'int64', id: 1 }, nanos: { type: 'int32', id: 2 } } },
  },
};

const definitions = fromJSON(messages, { longs: Number, defaults: true, arrays: true, objects: true });

/** What the trailer says; nothing if there is none or it cannot be read. */
export function statusDetails(trailer: Metadata): {
  reason?: string;
  metadata?: Record<string, string>;
  violations?: FieldViolation[];
  retryAfterMs?: number;
} {
  const [bytes] = trailer.get('grpc-status-details-bin');
  if (!(bytes instanceof Buffer)) return {};
  try {
    return Object.assign({}, ...decode<{ details: Any[] }>('Status', bytes).details.map(detail));
  } catch {
    return {};
  }
}

function detail({ typeUrl, value }: Any): object {
  switch (typeUrl.slice(typeUrl.lastIndexOf('/') + 1)) {
    case 'google.rpc.ErrorInfo':
      return decode<{ reason: string; metadata: Record<string, string> }>('ErrorInfo', value);
    case 'google.rpc.BadRequest':
      return { violations: decode<{ fieldViolations: FieldViolation[] }>('BadRequest', value).fieldViolations };
    case 'google.rpc.RetryInfo': {
      const { retryDelay } = decode<{ retryDelay: { seconds: number; nanos: number } | null }>('RetryInfo', value);
      return { retryAfterMs: retryDelay ? retryDelay.seconds * 1000 + retryDelay.nanos / 1e6 : 0 };
    }
    default:
      return {};
  }
}

function decode<T>(name: string, bytes: Buffer): T {
  return (definitions[name] as unknown as MessageTypeDefinition<never, T>).deserialize(bytes);
}
