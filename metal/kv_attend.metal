// Attention over pages whose keys and values both have codecs of ours.
#include "kv_keys.metal"
#include "kv_values.metal"
#include "kv_runs.metal"
