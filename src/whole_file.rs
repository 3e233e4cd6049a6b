//! Files that are written as a whole or not at all.

use std::fs::{self, File, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, fchown};
use std::path::Path;

/// What leads to something that a process has open, whatever that is.
const OPEN: [&str; 4] = ["/dev/stdout", "/dev/stderr", "/dev/fd", "/proc"];

/// Writes a file by `give`. A file that is there stays as it is until the new one, beside it, is
/// whole. What is no regular file, such as a pipe, gets the bytes as they come.
///
/// # Errors
/// Where the file cannot be written, or `give` fails: what was there is unchanged then.
pub fn write(path: &Path, give: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let before = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        metadata => Some(metadata?),
    };
    let is_file = before.as_ref().is_none_or(fs::Metadata::is_file) && !OPEN.iter().any(|place| path.starts_with(place));
    if !is_file {
        return give_all(File::create(path)?, give);
    }
    // A link stays one, to the new file.
    let target = match (&before, fs::read_link(path)) {
        (Some(_), _) => fs::canonicalize(path)?,
        (None, Ok(target)) => path.parent().unwrap_or(Path::new(".")).join(target),
        (None, Err(_)) => path.to_owned(),
    };
    let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    let partial = builder.prefix("trueup-").suffix(".partial").permissions(Permissions::from_mode(0o666)).tempfile_in(folder)?;
    if let Some(before) = before {
        // Who may not write a file may not replace it, and who could read it still can.
        File::options().append(true).open(&target)?;
        let _ = fchown(partial.as_file(), Some(before.uid()), Some(before.gid()));
        partial.as_file().set_permissions(before.permissions())?;
    }
    give_all(partial.as_file(), give)?;
    // A disk may say only now that it is full.
    partial.as_file().sync_all()?;
    partial.persist(&target)?;
    Ok(())
}

fn give_all(file: impl Write, give: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let mut file = BufWriter::new(file);
    give(&mut file)?;
    file.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_fails_half_way_leaves_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.csv");
        let half = |out: &mut dyn Write| {
            out.write_all(&[b'x'; 100_000])?;
            Err(io::ErrorKind::StorageFull.into())
        };
        assert_eq!(write(&path, half).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(names(folder.path()), [""; 0]);
        fs::write(&path, "old").unwrap();
        write(&path, half).unwrap_err();
        assert_eq!((fs::read_to_string(&path).unwrap().as_str(), names(folder.path())), ("old", vec!["out.csv".to_owned()]));
    }

    #[test]
    fn a_new_file_takes_the_place_of_the_old_one_with_its_link_and_mode() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("out.csv"), folder.path().join("latest"));
        fs::write(&path, "a longer old text").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("out.csv", &link).unwrap();
        write(&link, |out| out.write_all(b"new")).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(names(folder.path()), ["latest", "out.csv"]);
    }

    #[test]
    fn what_is_no_file_is_written_as_it_comes() {
        write(Path::new("/dev/null"), |out| out.write_all(b"gone")).unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), |_| Ok(())).unwrap_err();
        assert_eq!(names(folder.path()), [""; 0]);
    }

    #[test]
    fn a_link_to_nothing_yet_stays_one() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("target", &link).unwrap();
        write(&link, |out| out.write_all(b"new")).unwrap();
        assert_eq!(names(folder.path()), ["link", "target"]);
        assert_eq!(fs::read_link(&link).unwrap(), Path::new("target"));
    }
}
