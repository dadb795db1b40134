import { URLExt } from '@jupyterlab/coreutils';
import { ServerConnection } from '@jupyterlab/services';

/**
 * Call labkernel's server extension. The only place of this extension that talks to the server.
 *
 * A server that cannot be reached rejects with a `NetworkError`, one that answers with an error status with a
 * `ResponseError` that carries the server's own message.
 */
export async function request<T>(
  path: string,
  settings: ServerConnection.ISettings,
  init: RequestInit = {}
): Promise<T> {
  const url = URLExt.join(settings.baseUrl, 'labkernel', path);
  let response: Response;
  try {
    response = await ServerConnection.makeRequest(url, init, settings);
  } catch (error) {
    throw new ServerConnection.NetworkError(error as TypeError);
  }
  if (!response.ok) {
    const body = (await response.json().catch(() => ({}))) as { message?: string };
    throw new ServerConnection.ResponseError(response, body.message);
  }
  return (await response.json()) as T;
}
