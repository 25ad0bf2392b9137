"""The ledger's Lua: what must happen in Redis at once or not at all.

Every script looks first whether the job still exists: a key written later would live for ever.
"""

from __future__ import annotations

from typing import Final

# KEYS meta bits tries; ARGV index
BEGIN: Final = """
if redis.call('EXISTS', KEYS[1]) == 0 then return {'gone', 0} end
if redis.call('GETBIT', KEYS[2], ARGV[1]) == 1 then return {'committed', 0} end
local tries = redis.call('HINCRBY', KEYS[3], ARGV[1], 1)
redis.call('EXPIRE', KEYS[3], redis.call('HGET', KEYS[1], 'ttl'))
return {'go', tries}
"""

# KEYS meta bits commits tries staged, n values, their n sources; ARGV index n_texts, n values
# The first writer wins. A value that is '' lies at its source and is renamed. The others go first:
# under memory pressure Redis refuses a script at its first write or not at all.
COMMIT: Final = """
local n = #ARGV - 2
local sources = {}
for i = 1, n do
  if ARGV[2 + i] == '' then sources[#sources + 1] = KEYS[5 + n + i] end
end
local gone = redis.call('EXISTS', KEYS[1]) == 0
if gone or redis.call('GETBIT', KEYS[2], ARGV[1]) == 1 then
  if #sources > 0 then
    redis.call('UNLINK', unpack(sources))
    redis.call('SREM', KEYS[5], unpack(sources))
  end
  return gone and -1 or 0
end
if #sources > 0 and redis.call('EXISTS', unpack(sources)) < #sources then return -2 end
local ttl = redis.call('HGET', KEYS[1], 'ttl')
for i = 1, n do
  if ARGV[2 + i] ~= '' then redis.call('SET', KEYS[5 + i], ARGV[2 + i], 'EX', ttl) end
end
for i = 1, n do
  if ARGV[2 + i] == '' then
    redis.call('RENAME', KEYS[5 + n + i], KEYS[5 + i])
    redis.call('EXPIRE', KEYS[5 + i], ttl)
  end
end
redis.call('SETBIT', KEYS[2], ARGV[1], 1)
redis.call('XADD', KEYS[3], '*', 'i', ARGV[1], 'v', n)
redis.call('HINCRBY', KEYS[1], 'texts', ARGV[2])
redis.call('HDEL', KEYS[4], ARGV[1])
if #sources > 0 then redis.call('SREM', KEYS[5], unpack(sources)) end
for i = 1, 3 do redis.call('EXPIRE', KEYS[i], ttl) end
return 1
"""

# KEYS meta tries; ARGV index
FORGIVE: Final = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
if tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or '0') < 1 then return 0 end
return redis.call('HINCRBY', KEYS[2], ARGV[1], -1)
"""

# KEYS bits commits; ARGV index. A bit without its entry, as after an eviction, would keep the batch
# from being computed and its producer from ever hearing of it.
REVIVE: Final = """
if redis.call('GETBIT', KEYS[1], ARGV[1]) == 0 then return 0 end
for _, entry in ipairs(redis.call('XRANGE', KEYS[2], '-', '+')) do
  for i = 1, #entry[2], 2 do
    if entry[2][i] == 'i' and entry[2][i + 1] == ARGV[1] then return 1 end
  end
end
redis.call('SETBIT', KEYS[1], ARGV[1], 0)
return 0
"""

# KEYS bits commits, n values; ARGV index entry
FORGET: Final = """
redis.call('XDEL', KEYS[2], ARGV[2])
if #KEYS > 2 then redis.call('UNLINK', unpack(KEYS, 3)) end
if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('SETBIT', KEYS[1], ARGV[1], 0) end
"""
