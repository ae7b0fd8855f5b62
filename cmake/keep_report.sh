# keep_report.sh FOLDER nvcc ARGUMENTS...: runs the compiler, keeps what ptxas says of each source, and prints the rest.
folder=$1
shift
name=unknown
for argument; do
    case $argument in
        *.cu) name=$(basename "$argument") ;;
    esac
done
log=$(mktemp)
"$@" 2>"$log"
status=$?
grep -E "Compiling entry function|bytes stack frame|Used [0-9]+ registers" "$log" >"$folder/$name.txt"
grep -v -E "ptxas info|bytes stack frame" "$log" >&2
rm -f "$log"
exit $status
