# Facts about this kernel in one line of JSON. Reads /proc/cmdline, /proc/uptime,
# /proc/meminfo and dmesg; a fact that was not found is null.

# A JSON string. "\\&", a backslash and what was found, is the one replacement with a
# backslash that all awks understand alike: busybox 1.35 and 1.37 differ in the others.
function text(s) {
	if (s == "")
		return "null"
	gsub(/["\\]/, "\\\\&", s)
	gsub(/[[:cntrl:]]/, " ", s)
	return "\"" s "\""
}

function number(n) {
	return n == "" ? "null" : n + 0
}

FILENAME == "/proc/cmdline"	{ cmdline = $0; next }
FILENAME == "/proc/uptime"	{ uptime = $1; next }
FILENAME == "/proc/meminfo"	{ meminfo[$1] = $2; next }

# dmesg, each line with its time stamp
{ sub(/^(<[0-9]+>)?\[[^]]*\] /, "") }
/CPU.* started at EL[12]/ && match($0, /EL[12]/)	{ el = substr($0, RSTART + 2, 1) }
/^kvm /				{ kvm = kvm (kvm ? "; " : "") $0 }
/^KASLR /			{ kaslr = $0 }

END {
	generation = 1
	if (match(cmdline, /lab\.gen=[0-9]+/))
		generation = substr(cmdline, RSTART + 8, RLENGTH - 8)
	printf "{\"hello\": %d, \"release\": %s, \"el\": %s, \"kvm\": %s, \"kaslr\": %s, ",
		generation, text(release), number(el), text(kvm), text(kaslr)
	printf "\"mem_total\": %s, \"mem_free\": %s, \"uptime\": %s, ",
		number(meminfo["MemTotal:"]), number(meminfo["MemFree:"]), number(uptime)
	printf "\"cmdline\": %s, \"payload\": %s}\n", text(cmdline), text(payload)
}
