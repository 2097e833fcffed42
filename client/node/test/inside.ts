// What is not public. The compiled tests lie in dist/test, their sources elsewhere, so no one path would do for both.
const inside = <T>(file: string): Promise<T> => import(new URL(`../${file}`, import.meta.url).href);

export const { Connection } = await inside<typeof import('../dist/connection.js')>('connection.js');
export const { contract, definitions } = await inside<typeof import('../dist/contract.js')>('contract.js');
